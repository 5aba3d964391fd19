"""What batch scoring writes: files of scores, whole or not at all.

Units and stretches are those of :mod:`pipeline.serving.batch_input`. ``OUTPUT/_work/`` holds stretches,
``OUTPUT/NAME.parquet`` a whole unit.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.answer import ANSWER, GENERATED
from pipeline.contracts import Contract
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.retry import persistently
from pipeline.serving.batch_input import InputFile, Stretch, scores_name
from pipeline.storage import check_target, exists, filesystem, is_remote

PLAN, MANIFEST, WORK, QUARANTINE = "_score.json", "_manifest.json", "_work", "_quarantine"
_COLUMNS = [
    pa.field("row", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("task", pa.string()),
    pa.field("score", pa.float64()),
    pa.field("label", pa.int32()),
    pa.field("label_word", pa.string()),
    pa.field("probabilities", pa.list_(pa.float64())),
]
LIKELIHOODS = "log_likelihoods"
_FURTHER = [pa.field(GENERATED, pa.string()), pa.field(LIKELIHOODS, pa.list_(pa.float64()))]
"""Columns where a model writes, and where it explains itself."""
COLUMNS = tuple(field.name for field in (*_COLUMNS, *_FURTHER))
"""Names that no field that is carried along may have."""


class ScoringPlan(Contract):
    """``_score.json``, written first: what this output is of. Another plan needs another output."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str
    input: str
    task: str | None
    keep: tuple[str, ...]
    reading: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """How records are found in the files, as in ``data``; see ``DataConfig.reading``."""
    files: tuple[InputFile, ...]
    explain: bool = False


class ScoredFile(Contract):
    """One file of scores."""

    name: str
    rows: int
    reasons: dict[str, int]
    """Reason → rows that were put aside."""


class ScoreManifest(Contract):
    """``_manifest.json``, written last: the output is whole."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str
    input: str
    columns: dict[str, str]
    rows: int
    rejected: int
    """Rows that were put aside, under ``_quarantine``."""
    files: tuple[ScoredFile, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Reason → rows that were put aside, over all files."""
        found = Counter[str]()
        for file in self.files:
            found.update(file.reasons)
        return dict(found.most_common())


def schema(keep: Sequence[str], answered: Sequence[str] = ANSWER) -> pa.Schema:
    """Return the columns of the scores."""
    further = [field for field in _FURTHER if field.name in answered]
    return pa.schema([*_COLUMNS, *further, *(pa.field(name, pa.string()) for name in keep)])


def write_whole(url: str, fill: Callable[[Any], object]) -> None:
    """Write a file, local or remote, whole or not at all; ``fill`` writes to the open file."""
    fs, path = filesystem(url)
    if is_remote(url):  # an object that is closed early would stand there, cut off
        with tempfile.NamedTemporaryFile() as file:
            fill(file)
            file.flush()
            persistently(lambda: fs.put_file(file.name, path), url)
        return
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    scratch = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.part")
    with fs.open(scratch, "wb") as file:
        fill(file)
    fs.mv(scratch, path)


class Output:
    """The folder of the scores, local or remote.

    Args:
        url: of the folder.
        keep: fields that are carried along.
        answered: names of the values that an answer has.

    Raises:
        InputError: the folder can only be read.
    """

    def __init__(self, url: str, keep: Sequence[str], answered: Sequence[str] = ANSWER) -> None:
        self.url, self._schema, self.answered = check_target(url, "scores"), schema(keep, answered), tuple(answered)
        self._kept = len(keep)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, None where it is missing."""
        fs, path = filesystem(posixpath.join(self.url, name))
        return persistently(lambda: bytes(fs.cat_file(path)) if exists(fs, path) else None, f"{self.url}/{name}")

    def write(self, name: str, fill: Callable[[Any], object]) -> None:
        """Write a file whole or not at all.

        Args:
            name: within the output.
            fill: writes to the open file.
        """
        write_whole(posixpath.join(self.url, name), fill)

    def done(self, files: Sequence[InputFile]) -> tuple[dict[int, ScoredFile], dict[int, frozenset[int]]]:
        """Return what an earlier call has finished: whole units, and stretches of the others, by unit."""
        whole, parts = {}, {}
        for unit in range(len(files)):
            found = self.read(f"{WORK}/{unit:06d}.json")
            if found is not None:
                whole[unit] = ScoredFile.model_validate_json(found)
                continue
            fs, path = filesystem(posixpath.join(self.url, WORK, f"{unit:06d}"))
            names = [posixpath.basename(place) for place in fs.find(path)] if exists(fs, path) else []
            parts[unit] = frozenset(int(n[:6]) for n in names if re.fullmatch(r"\d{6}\.parquet", n))
        return whole, parts

    def write_stretch(self, stretch: Stretch, answers: Mapping[str, Sequence[Any]]) -> None:
        """Write a stretch's scores, the rows that were put aside first.

        Args:
            stretch: that was scored.
            answers: column → one value a sample, of all that the model says.
        """
        kept = zip(*(texts for *_, texts in stretch.rows), strict=True)
        numbers = {"row": [number for number, *_ in stretch.rows], "id": [known for _, known, _ in stretch.rows]}
        columns = numbers | dict(answers)
        values: list[Any] = [columns[name] for name in self._schema.names[: len(self._schema.names) - self._kept]]
        values += list(kept) or [[] for _ in range(self._kept)]
        table = pa.table([pa.array(v, f.type) for v, f in zip(values, self._schema, strict=True)], schema=self._schema)
        place = f"{WORK}/{stretch.unit:06d}/{stretch.number:06d}"
        if stretch.rejected:
            entries = [{"row": n, "reason": reason, "record": record} for n, reason, record in stretch.rejected]
            text = "".join(json.dumps(entry, default=str) + "\n" for entry in entries)
            self.write(f"{place}.rejects", lambda file: file.write(text.encode()))
        self.write(f"{place}.parquet", lambda file: pq.write_table(table, file))

    def join(self, unit: int, file: InputFile, stretches: int) -> ScoredFile:
        """Write a unit's file of scores from its stretches, and that of the rows that were put aside.

        Returns:
            What it holds.
        """
        places = [f"{WORK}/{unit:06d}/{number:06d}" for number in range(stretches)]
        rejects = b"".join(self.read(f"{place}.rejects") or b"" for place in places)
        reasons = Counter(parse_json(line)["reason"] for line in rejects.splitlines())
        rows = 0

        def fill(target: Any) -> None:
            nonlocal rows
            with pq.ParquetWriter(target, self._schema) as writer:
                for place in places:
                    fs, path = filesystem(posixpath.join(self.url, f"{place}.parquet"))
                    with fs.open(path, "rb") as part:
                        table = pq.read_table(part)
                    writer.write_table(table)
                    rows += table.num_rows

        self.write(scores_name(file.name), fill)
        if rejects:
            self.write(f"{QUARANTINE}/{file.name}.jsonl", lambda target: target.write(rejects))
        scored = ScoredFile(name=scores_name(file.name), rows=rows, reasons=dict(sorted(reasons.items())))
        self.write(f"{WORK}/{unit:06d}.json", lambda target: target.write(scored.model_dump_json().encode()))
        fs, path = filesystem(posixpath.join(self.url, WORK, f"{unit:06d}"))
        fs.rm(path, recursive=True)
        return scored

    def begin(self, plan: ScoringPlan) -> ScoreManifest | None:
        """Claim the output for a plan; return its manifest where it is whole already.

        Raises:
            InputError: the output is of another plan, or holds something else.
        """
        found = self.read(PLAN)
        if found is None:
            fs, path = filesystem(self.url)
            if exists(fs, path) and fs.find(path):
                raise InputError(f"--output must be a new folder, {self.url!r} holds other files; name another one")
            self.write(PLAN, lambda file: file.write(plan.model_dump_json(by_alias=True, indent=2).encode()))
            return None
        before = ScoringPlan.model_validate_json(found)
        if before != plan:
            names = ScoringPlan.model_fields
            other = [name for name in names if getattr(before, name) != getattr(plan, name)]
            raise InputError(
                f"--output must be of one model and one input, {self.url!r} differs in {other} (model there "
                f"{before.model}, here {plan.model}); name another folder, or ask for the same again"
            )
        whole = self.read(MANIFEST)
        return None if whole is None else ScoreManifest.model_validate_json(whole)

    def finish(self, plan: ScoringPlan, scored: Sequence[ScoredFile]) -> ScoreManifest:
        """Write the manifest and take the work away."""
        manifest = ScoreManifest(
            model=plan.model,
            input=plan.input,
            columns={field.name: str(field.type) for field in self._schema},
            rows=sum(file.rows for file in scored),
            rejected=sum(sum(file.reasons.values()) for file in scored),
            files=tuple(scored),
        )
        self.write(MANIFEST, lambda file: file.write(manifest.model_dump_json(by_alias=True, indent=2).encode()))
        fs, path = filesystem(posixpath.join(self.url, WORK))
        if exists(fs, path):
            fs.rm(path, recursive=True)
        return manifest
