"""What is ingested, from where, and how strictly."""

from __future__ import annotations

import codecs
import datetime as dt
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.settings import Settings
from pipeline.synthetic.config import SyntheticAdsConfig

ANY_TASK = "*"
"""Key of ``files`` for files whose records name their task themselves."""


def days_of(window: tuple[dt.date, dt.date]) -> Iterator[dt.date]:
    """Yield the days from the first to the last, both included."""
    for offset in range((window[1] - window[0]).days + 1):
        yield window[0] + dt.timedelta(days=offset)


class Replay(Settings):
    """Older daily partitions, so that what they taught is not forgotten."""

    window: tuple[dt.date, dt.date]
    """First and last day."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each task's records that is taken, drawn by a hash of the key and of the train window."""


def _check_encoding(name: str, key: str) -> None:
    if name == "auto":
        return
    try:
        codec = codecs.lookup(name)
    except LookupError:
        raise ValueError(f"{key} must be one that Python knows, got {name!r}; such as cp1252, or auto") from None
    if not codec._is_text_encoding:
        raise ValueError(f"{key} must be one of text, got {name!r}; such as cp1252")


class CsvDialect(Settings):
    """How CSV files are written."""

    delimiter: str = Field(default=",", pattern=r"^(.|auto)$")
    """What stands between two fields, one character such as ``;`` or a tab (``"\\t"`` in double quotes); ``auto`` takes
    what gives each file's first rows the same number of fields."""
    quote: str | None = Field(default='"', min_length=1, max_length=1)
    """What stands around a field that holds delimiters or line ends; null where nothing does."""
    escape: str | None = Field(default=None, min_length=1, max_length=1)
    """What takes its meaning from the character after it; with it, a quote within quotes need not be doubled."""
    doubled_quotes: bool = True
    """A quote within quotes is written twice."""
    encoding: str = "utf-8"
    """Of the text, by Python's names (``cp1252``, ``latin-1``). UTF-16 and UTF-32 are known by their bytes without
    being told; what is then no UTF-8 costs its row, and with ``auto`` the file is refused, with the ways to read it."""

    @model_validator(mode="after")
    def _check(self) -> CsvDialect:
        _check_encoding(self.encoding, "data.csv.encoding")
        signs = [sign for sign in (self.delimiter, self.quote, self.escape) if sign]
        if len(set(signs)) != len(signs) or set(signs) & {"\r", "\n", "\0"}:
            raise ValueError(
                f"data.csv's delimiter, quote and escape must differ and be no line ends, got {signs}; change one"
            )
        return self

    @property
    def is_open(self) -> bool:
        """Whether something is to be found out file by file."""
        return "auto" in (self.delimiter, self.encoding)


class DataConfig(Settings):
    """Input of a run."""

    READING: ClassVar[frozenset[str]] = frozenset({"csv", "json_encoding", "columns", "task_field", "id_field"})
    """Fields that say how single records are found in files, of whatever data."""

    source: Literal["synthetic_ads", "records", "webdataset"] = "synthetic_ads"
    """``synthetic_ads`` makes records; ``records`` reads JSON, JSONL, CSV or Parquet files, gzip or not;
    ``webdataset`` takes tars that others wrote and leaves them where they are: a member's extension is its field's
    name (``txt``, ``cls``, ``jpg``; a ``json`` member brings the fields inside it), and ``files`` names them."""
    root: str | None = None
    """Folder or URL (``s3://``, ``gs://``, ``az://``, ``abfs://``, ``hf://``, ``https://``); ``TASK/SPLIT.jsonl.gz``
    (also .json, .csv, each with .gz or not, .parquet) is looked up in it and in its folders (``SUITE/TASK/…``), SPLIT
    being train, validation (or valid, val, dev) and test; with ``windows`` ``DATE/TASK.jsonl.gz``, and
    ``SPLIT.jsonl.gz`` where records name their task."""
    files: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Task → split → path or glob, relative to ``root``, instead of the default layout. The task ``*`` stands for
    files whose records name their task in ``task_field``. With ``webdataset`` braces may count the tars:
    ``part-{0000..0009}.tar``."""
    columns: dict[str, str] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Field → column of the records, or dotted path into nested values, for all tasks that read the field, and for
    ``task_field``, ``id_field`` and ``time_field``; a task's own ``columns`` come first."""
    csv: CsvDialect = Field(default=CsvDialect(), exclude_if=lambda value: value == CsvDialect())
    """How CSV files are written; ``auto`` stands for ``{delimiter: auto, encoding: auto}``."""
    json_encoding: str = Field(default="utf-8", exclude_if=lambda value: value == "utf-8")
    """Of JSON files, as in ``csv.encoding``; JSON is UTF-8, UTF-16 or UTF-32 by its standard, so that only others need
    be told."""
    task_field: str = "task"
    """Field in which a record may name its task."""
    id_field: str = "id"
    """Field that becomes the sample's key; where it is absent, the place in the source does."""
    time_field: str = "date"
    """Field with the record's ISO date, where it has one."""
    windows: dict[str, tuple[dt.date, dt.date]] = Field(default_factory=dict)
    """Split → first and last day: take these daily partitions."""
    gaps: tuple[dt.date, ...] = ()
    """Days within ``windows`` and ``replay`` that have no partition."""
    replay: Replay | None = None
    """With ``windows``: older days, of which a share is mixed into the train split."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Samples in one tar; the last one of a split may hold fewer."""
    max_samples: dict[str, int] = Field(default_factory=dict)
    """Split → at most so many samples a task, a seeded sample in source order."""
    max_rejected_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a task's records that may be rejected as invalid before the run stops."""
    max_rejected: int | None = Field(default=None, ge=0)
    """Largest number of a task's records that may be rejected as invalid; None for no limit."""
    length_tokenizer: str | None = None
    """A ``tokenizer.json``: the index then holds each prompt's length in its tokens, else in characters. Length
    grouping pads far less with the tokens of the model that is trained."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Train records whose texts and label stand in an earlier train record of the task."""
    overlap: Literal["drop_train", "drop_evaluation", "keep"] = "drop_train"
    """Texts that stand in train and in another split: which side goes."""
    conflicts: Literal["majority", "drop", "first", "keep"] = "majority"
    """Train records of the same texts with different labels: keep those of the label that most have (none in a tie),
    none, those of the first one's label, or all. Evaluation splits are never thinned by ``duplicates`` and
    ``conflicts``, so that scores stay comparable. Different answers of ``generation`` tasks contradict nothing."""
    synthetic: SyntheticAdsConfig = SyntheticAdsConfig()
    """What is made with source ``synthetic_ads``."""

    def reading(self) -> dict[str, Any]:
        """Return how single records are found in files, of whatever data: what was told of dialects and of columns."""
        return self.model_dump(mode="json", include=set(self.READING), exclude_defaults=True)

    @field_validator("csv", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"delimiter": "auto", "encoding": "auto"} if value == "auto" else value

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        _check_encoding(self.json_encoding, "data.json_encoding")
        if self.source == "records" and self.root is None and not self.files:
            raise ValueError("data.root must be given for source 'records', got none; name the folder of the records")
        if self.source == "webdataset" and (not self.files or self.windows):
            raise ValueError(
                "source 'webdataset' reads the tars that data.files names, without windows, got "
                f"{len(self.files)} tasks in files; write data.files: {{TASK: {{train: 'part-{{0000..0009}}.tar'}}}}"
            )
        for split, (first, last) in self.windows.items():
            if first > last:
                raise ValueError(f"data.windows.{split} must run forwards, got {first} to {last}; swap the days")
        if self.replay is not None and (
            "train" not in self.windows or self.replay.window[1] >= self.windows["train"][0]
        ):
            raise ValueError(
                f"data.replay.window must end before data.windows.train begins, got {self.replay.window[1]} and "
                f"{self.windows.get('train', ('no window',))[0]}; replay older days only"
            )
        for split, count in self.max_samples.items():
            if count < 1:
                raise ValueError(f"data.max_samples.{split} must be >= 1, got {count}; leave it out for no limit")
        return self
