"""The typed, versioned artefacts that one stage hands the next.

Each carries a ``schema`` number; readers refuse one they do not know. On disk they are JSON, written atomically.
"""

from __future__ import annotations

import bisect
import json
import os
import secrets
import string
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipeline.errors import InputError
from pipeline.generation import TEXT_METRICS, WRITTEN_LABEL_METRICS, GenerationConfig
from pipeline.label_names import MOST_LABELS, class_of, with_label_keys

TaskKind = Literal["binary", "multiclass", "choice", "ordinal", "multilabel", "regression", "generation"]
Metric = Literal[
    "auc", "accuracy", "macro_f1", "f1", "matthews", "pearson", "spearman", "micro_f1", "macro_auc", "subset_accuracy",
    "exact_match", "token_f1", "rouge_l", "bleu", "chrf", "cider",
]  # fmt: skip
METRICS_OF_KIND: dict[str, frozenset[str]] = {
    "binary": frozenset({"auc", "accuracy", "macro_f1", "f1", "matthews"}),
    "multiclass": frozenset({"accuracy", "macro_f1", "matthews"}),
    "choice": frozenset({"accuracy"}),
    "ordinal": frozenset({"pearson", "spearman", "accuracy"}),
    "multilabel": frozenset({"micro_f1", "macro_f1", "macro_auc", "subset_accuracy"}),
    "regression": frozenset({"pearson", "spearman"}),
    "generation": TEXT_METRICS,
}
_METRIC_OF_KIND: dict[str, Metric] = {
    "binary": "auc",
    "ordinal": "pearson",
    "multilabel": "micro_f1",
    "regression": "pearson",
    "generation": "token_f1",
}
TASK_NAME = r"^[a-z0-9][a-z0-9_]{0,63}$"
TaskName = Annotated[str, Field(pattern=TASK_NAME)]
_OF_CLASSES = ("label_words", "labels", "label_values", "label_map", "labels_are", "class_weights", "segments")
"""Keys of a task that say something of its classes, or of an encoder that tells them."""
_OF_SCORES = ("labels", "class_weights", "length_normalized")
"""Keys of a task that mean something only where label words or heads are scored."""
PROBABILITIES_FIELD = "label_probabilities"
"""Field of an input record that carries the probability of each class where it is known; never part of a prompt."""


class Contract(BaseModel):
    """Base of every artefact: unknown keys are refused, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read one artefact from a JSON file.

        Raises:
            InputError: the file is missing, is no JSON, or breaks the contract.
        """
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{cls.__name__} must be a file, found none at {path}; run the stage that writes it"
            ) from None
        except ValueError as error:
            raise InputError(f"{path} must hold a valid {cls.__name__}: {error}; write it anew") from error

    def write(self, path: str | Path) -> None:
        """Write the artefact as JSON, atomically."""
        write_atomic(path, self._json())

    def _json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, sort_keys=False) + "\n"


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it, synced, then renamed over it.

    Who may read it is what the user's umask says, as of any file: ``umask 077`` keeps a run to its user.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class TaskSpec(Contract):
    """How one task is read, asked and scored.

    A sample's prompt is ``template`` with its fields filled in; the language model's log-likelihood of each label
    word right after the prompt is the score of that class (softmax over the classes).
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: TaskName
    """Lower-case letters, digits and ``_``; the same in every week."""
    kind: TaskKind = "binary"
    """What the label is: one of two classes, of several, of the record's own choices, a number on a scale, or a text
    that the model writes (``generation``); with an encoder also any set of classes (``multilabel``: a list of them) or
    any number (``regression``)."""
    template: str
    """Prompt; ``{field}`` stands for a field of the record. The answer follows directly. A task with ``segments`` may
    leave it out, where an encoder answers."""
    segments: tuple[str, ...] = Field(default=(), max_length=2, exclude_if=lambda value: not value)
    """For an encoder: templates of the one or two segments that it reads. Empty: the template's first field alone, and
    its other fields, with a space between; for ``choice`` all fields, and each answer."""
    label_words: tuple[str, ...] = ()
    """One word a class, in label order, with its leading space. Empty for ``choice``: the record brings them."""
    labels: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """For an encoder, which has a head for the task instead of words: the names of the classes, in label order."""
    label_values: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    """For ``ordinal``: the number each class stands for; the prediction is the expected value. For ``regression``: two
    numbers, such as the usual least and largest, on whose scale, where they are -1 and 1, the squared error is
    minimised; labels and predictions may lie beyond."""
    label_field: str = ""
    """Field of the record that holds the label; ``answer`` for ``choice`` and ``generation``, else ``label``. A
    generated answer is one text, or a list of texts that are all right: the first is learned, each is compared with."""
    labels_are: Literal["index", "word"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """How a label is read that could be both, the index of a class (for ordinal tasks a number) and a label word: None
    takes what only one reading allows and refuses what two readings take for different classes."""
    choices_field: str = "choices"
    """For ``choice``: field of the record that lists its answers."""
    image_field: str | None = None
    """Field that names an image, which is carried beside the sample."""
    group_field: str | None = None
    """Field that clusters samples (a query, a user): intervals are then drawn by cluster."""
    weight_field: str | None = None
    """Field that holds the weight of a record's loss in training, > 0; without it every record weighs 1."""
    columns: dict[str, str] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Field → name of the record's column that it is read from, such as ``{text_a: Product Title}``, or a dotted path
    into nested values, ``product.title`` or ``offers.0.price``. A column whose own name is the path comes first."""
    label_map: dict[str, int | float | str] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Label in the records → class: a label word, the index of the class, for ``ordinal`` the number, such as
    ``{Exact: 1, Irrelevant: 0}``; any number of labels may go to one class. A label is taken by its text, else as
    the same number; one that is not listed is rejected. Labels that YAML takes for truth values stand in quotes."""
    class_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, exclude_if=lambda value: not value
    )
    """Class, by label word or index, → factor of the training loss of its samples, > 0, on top of a sample's own
    weight; classes that are not listed have 1. Factors are not normalised, and evaluation does not see them. The
    factor of an ordinal label between two classes lies between theirs."""
    metric: Metric | None = None
    """The metric that stands for the task; ``auc`` for binary, ``pearson`` for ordinal and regression, ``micro_f1`` for
    multilabel, else ``accuracy``."""
    length_normalized: bool = False
    """Divide a label's log-likelihood by its number of tokens."""
    answer_by: Literal["scores", "generation"] = Field(default="scores", exclude_if=lambda value: value == "scores")
    """How a language model is asked for a label: by the ``scores`` of the label words, or by ``generation``: it learns
    to write the word, and a written text that is none of the words is a wrong answer."""
    generation: GenerationConfig = Field(
        default=GenerationConfig(), exclude_if=lambda value: value == GenerationConfig()
    )
    """How answers are written, where they are."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            kind = values.get("kind", "binary")
            values = dict(values)
            if values.get("segments"):
                values.setdefault("template", "")
            brings = kind in ("choice", "generation")
            values["label_field"] = values.get("label_field") or ("answer" if brings else "label")
            default = _METRIC_OF_KIND.get(str(kind), "accuracy")  # what is no text is refused with the other values
            if kind == "generation":
                values.setdefault("answer_by", "generation")
            elif values.get("answer_by") == "generation":
                default = "accuracy"
            values["metric"] = values.get("metric") or default
        return values

    @field_validator("label_map", "class_weights", mode="before")
    @classmethod
    def _texts_as_keys(cls, values: Any, info: ValidationInfo) -> Any:
        found = with_label_keys(values, str(info.field_name))
        if isinstance(found, dict) and (truths := [key for key, value in found.items() if isinstance(value, bool)]):
            raise ValueError(
                f"{info.field_name}: a value must be a number or text, got {found[truths[0]]!r} for {truths[0]!r}; "
                "write the class's index, or its word in quotes"
            )
        return found

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        for label, target in self.label_map.items():
            if (fault := self._target_fault(target)) is not None:
                raise ValueError(f"task {self.name!r}: label_map must map to classes, {label!r}: {target!r} {fault}")
        if self.kind in ("choice", "multilabel", "regression") and self.class_weights:
            why = {
                "choice": "has no classes to weigh, its records bring the answers",
                "multilabel": "has samples of several classes at once",
                "regression": "has no classes to weigh",
            }[self.kind]
            raise ValueError(
                f"task {self.name!r}: a {self.kind} task {why}; remove class_weights"
                f"{'' if self.kind == 'choice' else ', weight_field weighs samples'}"
            )
        self.loss_weights()
        return self

    def _target_fault(self, target: float | str) -> str | None:
        """Return why a label cannot be mapped to this; None where it can."""
        words = [word.strip() for word in self.class_names]
        if isinstance(target, str):
            found = self.kind != "regression" and target.strip() in words
            return None if found else f"is none of the label words {words}" if words else "is no number"
        if self.kind == "regression":
            return None
        if self.kind == "ordinal":
            low, high = min(self.label_values, default=0), max(self.label_values, default=0)
            return None if low <= target <= high else f"lies outside {low:g} to {high:g}"
        if target != int(target) or target < 0 or (words and target >= len(words)):
            return f"is no index within 0 to {len(words) - 1}" if words else "is no index of an answer"
        return None

    def loss_weights(self) -> tuple[float, ...]:
        """Return the factor of each class's loss in training, in label order; none without ``class_weights``.

        Raises:
            ValueError: a key names no class, or one class is named twice.
        """
        if not self.class_weights:
            return ()
        found: dict[int, float] = {}
        for name, weight in self.class_weights.items():
            try:
                place = class_of(name, self.class_names, self.labels_are)
            except ValueError as error:
                raise ValueError(f"task {self.name!r}: a key of class_weights {error}") from None
            if place in found:
                raise ValueError(f"task {self.name!r}: class_weights must name class {place} once, got it twice")
            found[place] = weight
        return tuple(found.get(place, 1.0) for place in range(len(self.class_names)))

    def loss_weight(self, label: float) -> float:
        """Return the factor of the training loss that ``class_weights`` gives a sample's label."""
        weights = self.loss_weights()
        if not weights:
            return 1.0
        if self.kind != "ordinal":
            return weights[int(label)]
        values, weights = zip(*sorted(zip(self.label_values, weights, strict=True)), strict=True)
        upper = min(bisect.bisect_left(values, label), len(values) - 1)
        lower = max(upper - 1, 0)
        if upper == lower or label >= values[upper]:
            return weights[upper]
        share = (label - values[lower]) / (values[upper] - values[lower])
        return weights[lower] + share * (weights[upper] - weights[lower])

    def as_prepared(self) -> Self:
        """Return the spec as far as shards depend on it: without weights of classes, and how answers are written."""
        answer_by = "generation" if self.kind == "generation" else "scores"
        return self.model_copy(update={"class_weights": {}, "answer_by": answer_by, "generation": GenerationConfig()})

    def as_asked(self) -> Self:
        """Return the spec as far as samples show it: without the way in which records were read."""
        return self.as_prepared().model_copy(update={"columns": {}, "label_map": {}})

    def _check_regression(self) -> None:
        if self.class_names:
            raise ValueError(
                f"task {self.name!r}: a regression task has no classes, got {list(self.class_names)}; remove "
                f"{'label_words' if self.label_words else 'labels'}, or take kind: ordinal"
            )
        if len(self.label_values) != 2 or not self.label_values[0] < self.label_values[1]:
            raise ValueError(
                f"task {self.name!r}: a regression task has two label_values, the lower first, got "
                f"{list(self.label_values)}; give the usual least and largest label, such as [0, 5]"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_written()
        if self.kind == "generation":
            pass
        elif self.kind == "regression":
            self._check_regression()
        elif self.kind == "choice":
            if self.class_names:
                raise ValueError(
                    f"task {self.name!r}: a choice task takes its answers from each record; remove "
                    f"{'label_words' if self.label_words else 'labels'}"
                )
            if len(self.segments) > 1:
                raise ValueError(
                    f"task {self.name!r}: the second segment of a choice task is the answer, got segments "
                    f"{list(self.segments)}; keep the first"
                )
        elif self.label_words and self.labels:
            raise ValueError(
                f"task {self.name!r}: classes are named once, got label_words {list(self.label_words)} and labels "
                f"{list(self.labels)}; leave labels out, an encoder takes label_words as names"
            )
        elif len(self.class_names) < 2:
            raise ValueError(
                f"task {self.name!r}: label_words must list at least 2 words, one a class in label order, "
                f"got {list(self.label_words)}; for example label_words: [' no', ' yes']"
            )
        if self.kind == "binary" and len(self.class_names) != 2:
            raise ValueError(
                f"task {self.name!r}: a binary task has 2 label_words, "
                f"got {len(self.class_names)}; use kind: multiclass"
            )
        if len(set(self.class_names)) != len(self.class_names):
            double = sorted({w for w in self.class_names if self.class_names.count(w) > 1})
            raise ValueError(
                f"task {self.name!r}: label_words must differ, got {double} twice; give each class its own word"
            )
        if self.kind == "multilabel" and len(self.class_names) > MOST_LABELS:
            raise ValueError(
                f"task {self.name!r}: a multilabel task has at most {MOST_LABELS} classes, got "
                f"{len(self.class_names)}; make two tasks of it"
            )
        if self.kind != "regression" and (
            (self.kind == "ordinal") != bool(self.label_values)
            or len(self.label_values) not in (0, len(self.class_names))
        ):
            raise ValueError(
                f"task {self.name!r}: an ordinal task, and no other, has one of label_values for each of label_words, "
                f"got {len(self.label_values)} for {len(self.class_names)} words of kind {self.kind!r}"
            )
        metrics = METRICS_OF_KIND[self.kind]
        if self.is_written and self.kind != "generation":
            metrics &= WRITTEN_LABEL_METRICS
        if self.metric not in metrics:
            raise ValueError(
                f"task {self.name!r}: metric of a {self.kind} task{' that is written' if self.is_written else ''} "
                f"must be one of {sorted(metrics)}, got {self.metric!r}"
            )
        if not self.text_fields:
            raise ValueError(
                f"task {self.name!r}: template must name at least one field of the record in braces, "
                f"got {self.template or self.segments!r}"
            )
        return self

    def _check_written(self) -> None:
        """Refuse what contradicts a written answer."""
        named = (*_OF_CLASSES, "length_normalized") if self.kind == "generation" else _OF_SCORES
        given = [name for name in named if getattr(self, name)]
        if self.kind == "generation" and (given or self.answer_by != "generation"):
            raise ValueError(
                f"task {self.name!r}: a generation task is answered by a text, which has no classes, got "
                f"{given or 'answer_by: scores'}; remove {' and '.join(given) or 'answer_by'}, or take another kind"
            )
        if self.kind in ("ordinal", "multilabel", "regression"):
            given.insert(0, f"kind: {self.kind}")
        if self.kind != "generation" and self.answer_by == "generation" and given:
            raise ValueError(
                f"task {self.name!r}: answer_by generation needs label words or choices that are all alike, got "
                f"{given[0]}; leave it out, or answer_by"
            )
        if self.answer_by == "scores" and self.generation != GenerationConfig():
            raise ValueError(
                f"task {self.name!r}: generation says how answers are written, and this task's are scored; add "
                "answer_by: generation, or remove generation"
            )

    @property
    def is_written(self) -> bool:
        """Whether the answer is a text that the model writes, and no score of label words."""
        return self.answer_by == "generation"

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The record's fields that template and segments name, in order of first use.

        Raises:
            ValueError: the template's braces do not pair, or name more than a plain field.
        """
        fields: dict[str, None] = {}
        parts = [part for text in (self.template, *self.segments) for part in string.Formatter().parse(text)]
        for _, field, spec, conversion in parts:
            if field is None:
                continue
            if not field.strip() or field.isdigit() or set(field) & set(".[]{}") or spec or conversion:
                got = f"{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
                raise ValueError(
                    f"task {self.name!r}: template may name plain fields only, without . : ! [ ] and not of digits "
                    f"alone, got {got}; write {{text_a}} and rename the field in the data; a brace that "
                    "is text is written twice: {{"
                )
            fields[field] = None
        return tuple(fields)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, one for a regression task's number; None where each record brings its own choices."""
        return 1 if self.kind == "regression" else len(self.class_names) or None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: label words, or labels where the task needs no words; empty for ``choice``."""
        return self.label_words or self.labels


class Sample(Contract):
    """One stored, validated example: what a shard's ``KEY.json`` holds."""

    key: str
    """Unique in its task and split; letters, digits, ``_`` and ``-`` only, since tar members split at the first dot."""
    task: TaskName
    fields: dict[str, str]
    """The texts that the template names."""
    label: float = Field(allow_inf_nan=False)
    """Class index; for ordinal and regression tasks the number itself; for multilabel tasks the sum of 2 to the power
    of each of its classes' indices (see :func:`pipeline.label_names.class_set`); 0 where the answer is a text."""
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """For ``generation``: the texts that are right, the one that is learned first."""
    group: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor of its loss in training."""
    time: str | None = None
    """ISO date of the record's partition, where it has one."""
    image: bytes | None = Field(default=None, exclude=True, repr=False)
    """The encoded image that stands beside ``KEY.json`` in the shard; never part of the JSON."""


ImageDigest = Literal["blake2b", "sha256", "crc32"]
"""What of an image goes into the digest by which duplicates are found; ``blake2b`` in shards of our own."""


class AdoptedTar(Contract):
    """A tar that others wrote and that is read where it lies."""

    url: str
    """Absolute path or URL."""
    stamp: str
    """What storage says of its version: the ETag, locally the time of its last change."""
    time_field: str
    """Field with a sample's ISO date, where it has one."""
    image_digest: ImageDigest = Field(default="sha256", exclude_if=lambda value: value == "sha256")
    """By what duplicates of images were looked for: ``sha256``, or ``crc32`` and the size, with SHA-256 for those alone
    that agree in it. With ``crc32``, the checksum of a sample is that of its texts and of its images' CRC-32."""


class ShardInfo(Contract):
    """One shard: a tar of samples of one task and split."""

    path: str
    """Relative to the manifest's folder; of an adopted tar only the index lies there."""
    adopted: AdoptedTar | None = Field(default=None, exclude_if=lambda value: value is None)
    """Where the tar lies, if others wrote it; several tasks may share one."""
    task: TaskName
    split: str
    samples: int = Field(ge=1, le=1 << 53)
    bytes: int = Field(ge=1, le=1 << 53)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the tar; of an adopted one of its place, size and stamp, while the index has a checksum of each sample."""
    index_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the index beside the shard; None where there is none and the tar itself must be scanned."""
    label_counts: dict[str, int]
    window: tuple[str, str] | None = None


class RejectCount(Contract):
    """Records of one task and split put aside for one reason."""

    task: str
    split: str
    reason: str
    records: int = Field(ge=1)


SHARDS_BEGIN, SHARDS_END = b'\n  "shards": [\n    {"', b"\n  ],\n"
"""What stands before and after the lines of a manifest's shards, the first line's start included."""


class ShardManifest(Contract):
    """What was prepared: written last, so its presence means that every shard it names is whole."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    tasks: tuple[TaskSpec, ...]
    shards: tuple[ShardInfo, ...]
    rejected: tuple[RejectCount, ...] = ()
    quarantine: tuple[str, ...] = ()
    """Files beside the manifest that hold the rejected records with their reasons."""
    window: tuple[str, str] | None = None
    """First and last day of the records, where they carry one."""
    source_sha256: str
    """Digest of the input and of the settings: equal digests mean nothing is to be prepared anew."""
    appended: tuple[str, ...] = ()
    """``source_sha256`` of each partition that was added later."""
    best_attainable: dict[str, float] = Field(default_factory=dict)
    """Synthetic data only: each task's metric on the test split under the known label probabilities."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def write(self, path: str | Path) -> None:
        """Write the artefact as JSON with one shard a line, atomically."""
        head, _, tail = self.model_copy(update={"shards": ()})._json().partition('"shards": []')
        lines = ",\n    ".join(shard.model_dump_json(by_alias=True) for shard in self.shards)
        write_atomic(path, f'{head}"shards": [\n    {lines}\n  ]{tail}' if lines else f'{head}"shards": []{tail}')

    def shards_of(self, task: str, split: str) -> tuple[ShardInfo, ...]:
        """Return the shards of one task and split in path order."""
        return tuple(sorted((s for s in self.shards if (s.task, s.split) == (task, split)), key=lambda s: s.path))

    def samples_of(self, task: str, split: str) -> int:
        """Return how many samples a task has in a split."""
        return sum(shard.samples for shard in self.shards_of(task, split))

    def task(self, name: str) -> TaskSpec:
        """Return one task's spec.

        Raises:
            InputError: the manifest has no such task.
        """
        for spec in self.tasks:
            if spec.name == name:
                return spec
        raise InputError(f"task must stand in the manifest, got {name!r}; known: {[t.name for t in self.tasks]}")


class TaskResult(Contract):
    """One task's scores on its test split. An undefined number is None, with the reason."""

    n: int
    metric: Metric
    value: float | None
    ci95: tuple[float, float] | None
    auc: float | None = None
    accuracy: float | None = None
    logloss: float | None = None
    ece: float | None = None
    reason: str | None = None
    best_attainable: float | None = None
    more: dict[str, float | None] = Field(default_factory=dict)
    """Further metrics by name (PR-AUC, macro-F1, …)."""
    intervals: dict[str, tuple[float, float] | None] = Field(default_factory=dict)
    """95 % interval of every metric by name."""
    undefined: dict[str, str] = Field(default_factory=dict)
    """Why a metric, or its interval alone, is undefined, by name."""
    rarer_class: int | None = None
    """Samples of the rarer class of a binary task; with groups, how many hold some. None: an earlier release."""


class MacroResult(Contract):
    """The unweighted mean of the tasks' own metrics."""

    value: float | None
    ci95: tuple[float, float] | None
    reason: str | None = None
    averages: str = ""
    """What is averaged: each task with its metric."""


def _check_scored(data: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(data.get("keys_sha256") or {}, dict):
        raise ValueError(f"data.keys_sha256 must hold a digest a task, got {str(data['keys_sha256'])[:80]!r}")
    return data


ScoredData = Annotated[dict[str, Any], AfterValidator(_check_scored)]
"""Which samples were scored: ``manifest_sha256``, ``split``, and ``keys_sha256`` by task."""


class EvaluationReport(Contract):
    """``evaluation.json``: what one model scored on one test set."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str
    data: ScoredData
    """``manifest_sha256`` and ``split`` of the samples scored."""
    tasks: dict[str, TaskResult]
    macro: MacroResult
    latency_ms: float | None = None
    """Median time to answer one row alone; measured where a gate limits it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Difference(Contract):
    """Candidate less reference on the same samples. Undefined numbers are None, with the reason."""

    candidate: float | None
    reference: float | None
    difference: float | None
    ci95: tuple[float, float] | None
    standard_error: float | None
    p_value: float | None
    """Two-sided, of no difference."""
    degrees_of_freedom: float | None = None
    """Of Student's t, by which the interval was made; None for the normal distribution."""
    reason: str | None = None

    @model_validator(mode="after")
    def _interval_is_of_a_difference(self) -> Self:
        if self.ci95 is not None and self.difference is None:
            raise ValueError(f"an interval must be that of a difference, got {self.ci95} and no difference")
        return self


class TaskDifference(Difference):
    """The difference in one task's own metric."""

    n: int
    metric: Metric
    p_holm: float | None
    """Adjusted for all tasks compared (Holm 1979)."""
    verdict: Literal["better", "worse", "no difference shown", "undefined"]
    """By the adjusted p-value at 5 %."""
    rarer_class: int | None = None
    """As in :class:`TaskResult`."""


class Comparison(Contract):
    """Two models on the same samples, task by task and in the macro mean."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    candidate: str
    reference: str
    data: ScoredData
    tasks: dict[str, TaskDifference]
    macro: Difference
    """Unweighted mean of the tasks' differences."""
    only_one: dict[str, str] = Field(default_factory=dict)
    """Tasks that one of the two models does not know, and which."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class PromotionDecision(Contract):
    """``decision.json``: whether a candidate takes over, and why."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    verdict: Literal["PROMOTE", "HOLD", "REJECT"]
    reasons: tuple[str, ...]
    candidate: str
    champion: str | None
    tasks: dict[str, str]
    """Verdict a task, in words."""
    evidence: tuple[str, ...] = ()
    """What it rests on, in words: champion, anchor, how often this holdout was looked at. Empty in earlier releases."""
    anchor: str | None = None
    """The best earlier champion, that the candidate was held against beside the champion; the champion where that is
    the best itself."""
    becomes_anchor: bool = False
    """Whether later candidates are held against this one instead, once it is champion."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class CheckpointManifest(Contract):
    """What stands beside a checkpoint: written last, with a hash of every file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    step: int = Field(ge=0)
    num_ranks: int
    zero_stage: int
    adapter_sha256: str
    """Digest of the adapter's configuration and the base's fingerprint: another adapter is refused."""
    files: dict[str, str]
    """Relative path → sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
