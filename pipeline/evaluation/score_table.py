"""The scores of one model on one test set: one row a sample, kept as Parquet, grouped by task for the metrics.

Axes: N samples, C classes (padded with zeros where a choice task offers fewer).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation.text_metrics import WrittenAnswers
from pipeline.label_names import THRESHOLD

PARTS = 200
"""Groups, or parts of as many groups, that are left out one after the other."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COLUMNS = ("key", "task", "label", "scores", "group")
WRITTEN = ("text", "references")
"""Further columns where tasks are answered by texts: what the model wrote, and the texts that are right."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("label", pa.float64()),
        ("scores", pa.list_(pa.float64())),
        ("group", pa.string()),
    ]
)


_ROUNDING = 1e-4
"""How far outside 0 to 1 rounding may carry a probability."""


def check_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the frame as it came, or say what is wrong with it.

    Raises:
        InputError: a column is missing, or a task's key stands in it twice.
    """
    missing = [name for name in COLUMNS if name not in scores.columns]
    if missing:
        raise InputError(f"scores must have the columns {list(COLUMNS)}, lacks {missing}; write them with predict()")
    double = scores.duplicated(["task", "key"])
    if double.any():
        first = scores.loc[double, ["task", "key"]].iloc[0].tolist()
        raise InputError(
            f"each sample must be scored exactly once, got {int(double.sum())} double ones, "
            f"first (task, key) = {first}; score the split anew"
        )
    return scores


def write_scores(path: str | Path, scores: pd.DataFrame) -> None:
    """Write scores as Parquet, atomically; columns beyond the five are kept as they are.

    Raises:
        InputError: a column is missing, or a sample is there twice.
    """
    check_scores(scores)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = [name for name in scores.columns if name not in COLUMNS]
    table = pa.Table.from_pandas(scores[list(COLUMNS)], schema=SCHEMA, preserve_index=False)
    for name in extra:
        table = table.append_column(str(name), pa.Array.from_pandas(scores[name]))
    temporary = path.with_name(f".{path.name}.part")
    pq.write_table(table.replace_schema_metadata(None), temporary, compression="zstd")
    temporary.replace(path)


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read scores that :func:`write_scores` wrote.

    Raises:
        InputError: the file is missing, is no Parquet, or breaks the form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"scores must be a Parquet file, found none at {path}; run evaluate first")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"scores must be a Parquet file, {path} is none: {error}; run evaluate again") from error
    frame = table.to_pandas()
    if "group" in frame.columns:
        frame["group"] = frame["group"].astype(object).where(frame["group"].notna(), None)
    return check_scores(frame)


@dataclass(frozen=True)
class TaskScores:
    """One task's samples as arrays.

    Args:
        spec: the task.
        keys: (N,) sample keys.
        labels: (N,) class index; the number itself for ordinal and regression tasks; for multilabel tasks the set of
            classes (:func:`pipeline.label_names.class_set`).
        probabilities: (N, C) class probabilities, zero beyond a sample's own choices; the number for regression tasks.
        groups: (N,) cluster codes from zero, or None where no sample names a group.
        clusters: name of each cluster, by which tasks know a group that they share; None for a sample without one.
        texts: (N,) what the model wrote, of a task whose answers are free texts; None for labels.
        references: (N,) the texts that are right, a tuple a sample.
    """

    spec: TaskSpec
    keys: NDArray[np.object_]
    labels: Floats
    probabilities: Floats
    groups: Ints | None = None
    clusters: tuple[str | None, ...] = ()
    texts: NDArray[np.object_] | None = None
    references: NDArray[np.object_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def score(self) -> Floats:
        """(N,) What orders the samples: P(class 1) if binary, the number if ordinal or regression, else the largest."""
        if self.spec.kind == "binary":
            return np.ascontiguousarray(self.probabilities[:, 1])
        if self.spec.kind == "ordinal":
            return self.probabilities @ np.asarray(self.spec.label_values)
        return self.probabilities.max(axis=1)  # of a regression task there is one alone

    @cached_property
    def classes(self) -> Ints:
        """(N,) True class index; for ordinal tasks the class whose value is nearest; for multilabel tasks the set."""
        return self._nearest(self.labels) if self.spec.kind == "ordinal" else self.labels.astype(np.int64)

    @cached_property
    def predicted(self) -> Ints:
        """(N,) Predicted class index; for ordinal tasks the class nearest to the expected value; for multilabel tasks
        the set of classes of at least one half; -1 where what was written is the word of no class."""
        if self.spec.kind == "multilabel":
            return self.said @ (1 << np.arange(self.said.shape[1]))
        if self.spec.kind == "ordinal":
            return self._nearest(self.score)
        return np.where(self.probabilities.any(axis=1), self.probabilities.argmax(axis=1), -1)

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """(N,) Whether the predicted class is the label, or a free text one of its references."""
        return self.answers.exact_match == 1 if self.spec.kind == "generation" else self.predicted == self.classes

    @cached_property
    def answers(self) -> WrittenAnswers:
        """The free texts and their references."""
        if self.texts is None or self.references is None:
            raise ValueError(f"task {self.spec.name!r} must have texts to be compared, it is of kind {self.spec.kind}")
        return WrittenAnswers(self.texts, self.references)

    @cached_property
    def has(self) -> NDArray[np.bool_]:
        """(N, C) Whether a sample of a multilabel task has a class."""
        return (self.labels.astype(np.int64)[:, None] >> np.arange(self.probabilities.shape[1]) & 1).astype(bool)

    @cached_property
    def said(self) -> Ints:
        """(N, C) Whether a class of a multilabel task is one of the answer's, as 0 or 1."""
        return (self.probabilities >= THRESHOLD).astype(np.int64)

    @cached_property
    def surprise(self) -> Floats:
        """(N,) Natural-log loss of the label; an ordinal label between two values shares its mass between them; of a
        multilabel task the mean over its classes."""
        tiny = np.finfo(np.float64).eps
        logs = -np.log(np.clip(self.probabilities, tiny, 1.0 - tiny))
        if self.spec.kind == "multilabel":
            against = -np.log(np.clip(1.0 - self.probabilities, tiny, 1.0 - tiny))
            return np.where(self.has, logs, against).mean(axis=1)
        if self.spec.kind != "ordinal":
            return np.take_along_axis(logs, self.classes[:, None], axis=1)[:, 0]
        values = np.asarray(self.spec.label_values)
        order = np.argsort(values)
        labels = np.clip(self.labels, values.min(), values.max())
        upper = np.clip(np.searchsorted(values[order], labels), 1, len(values) - 1)
        low, high = order[upper - 1], order[upper]
        share = (labels - values[low]) / (values[high] - values[low])
        rows = np.arange(len(labels))
        return (1.0 - share) * logs[rows, low] + share * logs[rows, high]

    def _nearest(self, numbers: Floats) -> Ints:
        values = np.asarray(self.spec.label_values)
        return np.abs(numbers[:, None] - values[None, :]).argmin(axis=1)

    def take(self, rows: NDArray[np.bool_] | Ints) -> TaskScores:
        """Return the named rows, in that order; cluster codes are numbered anew."""
        groups, clusters = None, self.clusters
        if self.groups is not None:
            kept, groups = np.unique(self.groups[rows], return_inverse=True)
            clusters = tuple(self.clusters[code] for code in kept) if self.clusters else ()
        texts, references = (None if column is None else column[rows] for column in (self.texts, self.references))
        return TaskScores(
            *(self.spec, self.keys[rows], self.labels[rows], self.probabilities[rows], groups, clusters),
            *(texts, references),
        )


def by_task(scores: pd.DataFrame, specs: Sequence[TaskSpec]) -> dict[str, TaskScores]:
    """Split a frame into its tasks, in the order of ``specs``, rows in key order; a task without rows is left out.

    Raises:
        InputError: the frame names a task that ``specs`` lacks, or a row's scores do not fit its task.
    """
    check_scores(scores)
    known = {spec.name: spec for spec in specs}
    for name in scores["task"].unique():
        if name not in known:
            raise InputError(f"scores must be of known tasks, got task {name!r}{did_you_mean(str(name), known)}")
    parts: Mapping[str, pd.DataFrame] = {str(name): part for name, part in scores.groupby("task", sort=False)}
    return {name: _task_scores(known[name], parts[name].sort_values("key")) for name in known if name in parts}


def _task_scores(spec: TaskSpec, part: pd.DataFrame) -> TaskScores:
    rows = list(part["scores"])
    widths = np.fromiter(map(len, rows), np.int64, len(rows))
    flat = np.concatenate([np.asarray(row, np.float64) for row in rows])
    if (widths == widths[0]).all():
        probabilities = flat.reshape(len(rows), widths[0])
    else:
        probabilities = np.zeros((len(rows), widths.max()))
        probabilities[np.arange(widths.max()) < widths[:, None]] = flat
    labels = part["label"].to_numpy(np.float64)
    if spec.num_classes is not None and (widths != spec.num_classes).any():
        raise InputError(
            f"task {spec.name!r}: a row must have one score a class, {spec.num_classes}, "
            f"got {sorted(set(widths.tolist()))}; score with the task specs that trained it"
        )
    # Negated, so that NaN counts as outside; a sum in float32 may end a little above 1.
    is_number = spec.kind == "regression"
    outside = ~np.isfinite(flat) if is_number else ~((flat >= -_ROUNDING) & (flat <= 1 + _ROUNDING))
    if outside.any() and is_number:
        raise InputError(
            f"task {spec.name!r}: scores must be finite numbers, got {int(outside.sum())} that are not; look at the "
            "training's losses"
        )
    if outside.any():
        raise InputError(
            f"task {spec.name!r}: scores must be finite probabilities from 0 to 1, got {int(outside.sum())} that are "
            f"not, first {flat[outside][0]:g}; score() must return softmax probabilities, no logits"
        )
    limits = 2.0**widths if spec.kind == "multilabel" else widths
    if spec.kind not in ("ordinal", "regression") and ((labels < 0) | (labels >= limits) | (labels % 1 != 0)).any():
        what = "a set of classes" if spec.kind == "multilabel" else "a class index"
        raise InputError(f"task {spec.name!r}: a label must be {what} below the number of scores")
    scored = TaskScores(spec, part["key"].to_numpy(object), labels, probabilities, *_group_codes(part["group"]))
    if spec.kind != "generation":
        return scored
    texts, references = _texts(spec, part)
    return replace(scored, texts=texts, references=references)


def _texts(spec: TaskSpec, part: pd.DataFrame) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Return the texts and the references of a task that is answered by free texts."""
    if missing := [name for name in WRITTEN if name not in part.columns or part[name].isna().any()]:
        raise InputError(
            f"task {spec.name!r} is answered by texts, each sample's scores must have {missing}; evaluate it anew"
        )
    references = np.empty(len(part), object)
    references[:] = [tuple(map(str, each)) for each in part["references"]]
    return part["text"].to_numpy(object), references


def _group_codes(column: pd.Series) -> tuple[Ints | None, tuple[str | None, ...]]:
    if column.isna().all():
        return None, ()
    codes, known = pd.factorize(column, sort=True)
    alone = codes < 0  # a sample without a group is a cluster of its own
    codes = codes.astype(np.int64)
    codes[alone] = len(known) + np.arange(alone.sum())
    return codes, (*map(str, known), *(None,) * int(alone.sum()))


def shared_parts(samples: Mapping[str, TaskScores]) -> dict[str, Ints | None]:
    """Return the part, below :data:`PARTS`, that each sample's group belongs to, (N,) a task; None without groups.

    A group that several tasks hold is in one part.
    """
    named = sorted({name for sample in samples.values() for name in sample.clusters if name is not None})
    known = {name: number for number, name in enumerate(named)}
    free = itertools.count(len(named))
    return {
        name: None
        if sample.groups is None
        else np.array([next(free) if c is None else known[c] for c in sample.clusters])[sample.groups] % PARTS
        for name, sample in samples.items()
    }


def keys_sha256(sample: TaskScores) -> str:
    """Return a digest of which samples with which labels were scored: equal digests, the same holdout."""
    digest = hashlib.sha256()
    told = sample.labels.tolist() if sample.references is None else sample.references.tolist()
    for key, label in zip(sample.keys.tolist(), told, strict=True):
        digest.update(f"{key}\t{label!r}\n".encode())
    return digest.hexdigest()
