"""The ledger of samples: which sample was given at which step to which rank."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.contracts import Sample, write_atomic
from pipeline.errors import InputError

LEDGER = "samples.jsonl"


class SampleLedger:
    """One rank's part of the ledger, a line a sample; used as a context manager.

    A resumed run opens it with the step it goes on from: what was written from there on is dropped first.
    """

    def __init__(self, folder: Path, rank: int, start_step: int = 0) -> None:
        self._path = Path(folder) / f".samples-rank-{rank:05d}.jsonl"
        self._rank = rank
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] < start_step] if start_step else []
        write_atomic(self._path, "".join(kept))
        self._file = self._path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Write down what this rank was given at a step."""
        for sample in samples:
            entry = {"step": step, "rank": self._rank, "task": sample.task, "key": sample.key}
            self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def merge_ledgers(folder: Path) -> Path:
    """Merge the ranks' parts into ``samples.jsonl``, by step and rank, and return it.

    Raises:
        InputError: there is no part.
    """
    folder = Path(folder)
    parts = sorted(folder.glob(".samples-rank-*.jsonl"))
    if not parts:
        raise InputError(f"a ledger must be kept by every rank, found none in {folder}; train with the ledger on")
    entries = heapq.merge(*map(_lines, parts), key=lambda line: (json.loads(line)["step"], json.loads(line)["rank"]))
    temporary = folder / f".{LEDGER}.part"
    with temporary.open("w") as file:
        file.writelines(entries)
    temporary.replace(folder / LEDGER)
    return folder / LEDGER


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open() as file:
            yield from (line for line in file if line.endswith("\n"))
