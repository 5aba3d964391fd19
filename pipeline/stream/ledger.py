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
from pipeline.json_text import parse_json
from pipeline.world import World

LEDGER = "samples.jsonl"
_PARTS = ".samples-rank-*.jsonl"


class SampleLedger:
    """One rank's part of the ledger, a line a sample; used as a context manager.

    A resumed run opens it with the step it goes on from: what was written from there on, by however many ranks, is
    dropped first. Each step reaches the file before the next one begins, so a killed rank loses no step it finished.
    """

    def __init__(self, folder: Path, world: World, start_step: int = 0) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._rank = world.rank
        for path in folder.glob(_PARTS):
            if _rank_of(path) % world.num_ranks == world.rank:  # the parts of ranks that are no more are shared out
                write_atomic(path, "".join(line for line in _lines(path) if parse_json(line)["step"] < start_step))
        self._file = (folder / _PARTS.replace("*", f"{world.rank:05d}")).open("a")

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
    """Merge the ranks' parts into ``samples.jsonl``, by step and rank, and return it; the parts stay.

    Raises:
        InputError: there is no part.
    """
    folder = Path(folder)
    parts = sorted(folder.glob(_PARTS))
    if not parts:
        raise InputError(f"a ledger must be kept by every rank, found none in {folder}; train with the ledger on")
    entries = heapq.merge(*map(_lines, parts), key=lambda line: (parse_json(line)["step"], parse_json(line)["rank"]))
    temporary = folder / f".{LEDGER}.part"
    with temporary.open("w") as file:
        file.writelines(entries)
    temporary.replace(folder / LEDGER)
    return folder / LEDGER


def _rank_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _lines(path: Path) -> Iterator[str]:
    with path.open() as file:
        yield from (line for line in file if line.endswith("\n"))
