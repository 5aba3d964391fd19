"""Scores of live requests, kept without their texts: Parquet files that are rotated, and labels that come later.

``LOG/scores/`` holds files of the columns :data:`SCORES`, ``LOG/labels/`` of :data:`LABELS`; ``LOG/state.json`` says
which challenger was taken back and why, and how far the live texts have drifted.
"""

from __future__ import annotations

import datetime as dt
import json
import posixpath
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.ingestion.records import Unit, read_unit
from pipeline.ingestion.source_file import SourceFile
from pipeline.json_text import parse_json
from pipeline.labels import read_label
from pipeline.record import Rejected, as_text, value_of
from pipeline.serving.batch_input import find_files
from pipeline.serving.batch_output import write_whole
from pipeline.storage import exists, filesystem

SCORES = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("request", pa.string()),
        ("row", pa.int32()),
        ("id", pa.string()),
        ("key", pa.string()),
        ("task", pa.string()),
        ("model", pa.string()),
        ("role", pa.string()),
        ("score", pa.float64()),
        ("probabilities", pa.list_(pa.float64())),
    ]
)
"""A row a version: ``role`` is ``live`` (the champion answered), ``canary`` (the challenger did) or ``shadow``."""
LABELS = pa.schema([("request", pa.string()), ("row", pa.int32()), ("id", pa.string()), ("label", pa.string())])
STATE = "state.json"
_ROWS = 5000
"""A file is written when so many rows wait, or when it is time."""


class LiveLog:
    """Writes scores; one a process.

    Args:
        url: of the log.
        max_mib: size from which on the oldest files go.
        flush_s: longest time that a row waits.
    """

    def __init__(self, url: str, max_mib: int, flush_s: float) -> None:
        self._url, self._most, self._flush_s = url, max_mib << 20, flush_s
        self._rows: list[tuple[Any, ...]] = []
        self._since = time.monotonic()

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Keep rows of :data:`SCORES` without the time, to be written with the next file."""
        now = dt.datetime.now(dt.UTC)
        self._rows += [(now, *row) for row in rows]
        del self._rows[: max(len(self._rows) - 20 * _ROWS, 0)]  # the store may be away

    @property
    def is_due(self) -> bool:
        """Whether a file is to be written."""
        return len(self._rows) >= _ROWS or (bool(self._rows) and time.monotonic() - self._since > self._flush_s)

    def flush(self) -> None:
        """Write what waits as a file, and remove the oldest ones beyond the size."""
        rows, self._since = self._rows[:], time.monotonic()
        if not rows:
            return
        columns = zip(*rows, strict=True)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)], schema=SCORES)
        now = rows[0][0]
        name = f"scores/{now:%Y-%m-%d}/{now:%H%M%S}-{uuid.uuid4().hex[:12]}.parquet"
        write_whole(posixpath.join(self._url, name), lambda file: pq.write_table(table, file))
        del self._rows[: len(rows)]
        self._rotate()

    def _rotate(self) -> None:
        fs, root = filesystem(posixpath.join(self._url, "scores"))
        found = sorted(fs.find(root, detail=True).items())  # by day and time
        total = sum(int(info["size"]) for _, info in found)
        for place, info in found[:-1]:
            if total <= self._most:
                return
            fs.rm(place)
            total -= int(info["size"])


def read_state(url: str) -> dict[str, Any]:
    """Return the log's state: ``taken_back`` (version → reason), ``drift`` (reasons)."""
    fs, path = filesystem(posixpath.join(url, STATE))
    found: dict[str, Any] = parse_json(fs.cat_file(path)) if exists(fs, path) else {}
    return {"taken_back": {}, "drift": [], **found}


def take_back(url: str, model: str, reason: str) -> None:
    """Write down that a challenger answers no more live requests."""
    state = read_state(url)
    now = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
    state["taken_back"].setdefault(model, f"{now}: {reason}")
    _write_state(url, state)


def note_drift(url: str, reasons: Sequence[str]) -> None:
    """Write down how far the live texts have drifted."""
    _write_state(url, read_state(url) | {"drift": list(reasons)})


def _write_state(url: str, state: dict[str, Any]) -> None:
    write_whole(posixpath.join(url, STATE), lambda file: file.write(json.dumps(state, indent=2).encode()))


def add_labels(url: str, labels: str) -> int:
    """Keep labels of scored rows; return how many.

    Args:
        url: of the log.
        labels: record files: ``label``, and either ``request`` as the answer named it, with ``row`` (from 0, which is
            taken where it is missing), or the ``id`` that the row brought.

    Raises:
        InputError: there is no such file, or a record lacks one of them; nothing is kept then.
    """
    rows = []
    for number, file in enumerate(find_files(labels)):
        source = SourceFile("*", "score", file.location, file.name, size=file.size, digest=file.version)
        for line in read_unit(Unit(source, number), DataConfig(source="records", root=".")):
            rows.append(_label(line.record, f"{file.name}, row {line.number}", line.error))
    table = pa.Table.from_pylist(rows, schema=LABELS)
    now = dt.datetime.now(dt.UTC)  # files are read in the order of their names, and the newest label counts
    name = f"labels/{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:12]}.parquet"
    write_whole(posixpath.join(url, name), lambda file: pq.write_table(table, file))
    return len(rows)


def _label(record: dict[str, Any], where: str, error: str | None) -> dict[str, Any]:
    try:
        if error is not None:
            raise Rejected(error)
        known = {name: value_of(record, name) for name in ("request", "row", "id", "label")}
        label = as_text(known["label"])
        request, own = (None if known[name] is None else as_text(known[name]) for name in ("request", "id"))
        if label is None or (request is None and own is None):
            raise Rejected("it lacks 'label', or both 'request' and 'id'")
        return {"request": request, "row": int(known["row"] or 0), "id": own, "label": label}
    except (Rejected, TypeError, ValueError) as reason:
        raise InputError(
            f"a label must be a record with 'label' and 'request' (and 'row') or 'id', {where} is none: {reason}"
        ) from reason


def labelled(url: str, specs: Sequence[TaskSpec]) -> pd.DataFrame:
    """Return the logged scores whose labels have come: the columns :data:`SCORES` and ``label``, a class index (for
    ordinal tasks the number); the newest label of a row counts. Tasks of several classes at once and of texts are left
    out.

    Raises:
        InputError: a label is none of its task.
    """
    scores, labels = (_read(url, name, schema) for name, schema in (("scores", SCORES), ("labels", LABELS)))
    known = {spec.name: spec for spec in specs if spec.kind not in ("multilabel", "generation")}
    scores = scores[scores["task"].isin(list(known))]
    by_request = labels[labels["request"].notna()].drop_duplicates(["request", "row"], keep="last")
    by_id = labels[labels["request"].isna()].drop_duplicates("id", keep="last")
    found = pd.concat(
        [
            scores.merge(by_request[["request", "row", "label"]], on=["request", "row"]),
            scores.merge(by_id[["id", "label"]], on="id"),
        ]
    ).drop_duplicates(["request", "row", "model"], keep="first")
    texts = zip(found["task"], found["label"], found["probabilities"], strict=True)
    found["label"] = [_class(known[task], label, len(row)) for task, label, row in texts]
    return found.reset_index(drop=True)


def _class(spec: TaskSpec, label: str, classes: int) -> float:
    try:
        return read_label({spec.label_field: label}, spec, [""] * classes)
    except Rejected as reason:
        raise InputError(f"a label of task {spec.name!r} must be one of its own, got {label!r}: {reason}") from reason


def _read(url: str, name: str, schema: pa.Schema) -> pd.DataFrame:
    fs, root = filesystem(posixpath.join(url, name))
    places = sorted(fs.find(root)) if exists(fs, root) else []
    tables = []
    for place in places:
        if place.endswith(".parquet") and not posixpath.basename(place).startswith("."):
            with fs.open(place, "rb") as file:
                tables.append(pq.read_table(file, schema=schema))
    return pa.concat_tables(tables or [schema.empty_table()]).to_pandas()


def pairs(found: pd.DataFrame, candidate: str, champion: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both versions' scores of the rows that both have scored, as score tables (see
    :mod:`pipeline.evaluation.score_table`); rows of one key are a group.

    Args:
        found: what :func:`labelled` returns.
        candidate: name of the one version.
        champion: of the other.
    """
    ours, theirs = (found[found["model"] == name].set_index(["request", "row"]) for name in (candidate, champion))
    shared = ours.index.intersection(theirs.index)
    tables = []
    for side in (ours, theirs):
        rows = side.loc[shared].reset_index()
        keys = [f"{request}/{row}" for request, row in zip(rows["request"], rows["row"], strict=True)]
        group = rows["key"].astype(object).where(rows["key"].notna(), None)
        columns = {"key": keys, "task": rows["task"], "label": rows["label"], "scores": rows["probabilities"]}
        tables.append(pd.DataFrame(columns | {"group": group}))
    return tables[0], tables[1]
