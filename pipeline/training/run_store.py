"""What a rank keeps of a run whose folder lies on object storage: checkpoints, ledger, words to driver and ranks."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.contracts import Sample, write_atomic
from pipeline.errors import InputError
from pipeline.mirror import Mirror, working_folder
from pipeline.progress import say
from pipeline.training.checkpoint import MANIFEST, Checkpoints
from pipeline.world import World

_ASKED_EVERY_S = 2.0
"""Seconds between two looks whether the driver asks all to stop."""
_HISTORY = ("history.jsonl", "history.jsonl.sent")
"""Rows of the training log, and what MLflow has of them."""
_SEGMENTS = ".ledger"
"""Folder of the ledger's segments, ``rank-RRRRR-from-SSSSSSSS.jsonl``, each of the steps between two checkpoints."""
_RANKS = "ranks"
"""Folder of the ranks' working copies on a machine."""


class StoredCheckpoints(Checkpoints):
    """Checkpoints that are sent to object storage while training goes on.

    A checkpoint is there when its manifest is, and the history before it. The next one is not begun earlier.

    Args:
        root: the working copy's ``checkpoints`` folder.
        adapter_sha256: of the run.
        keep: so many of the newest stay, and the best one.
        mirror: of the run's folder.
    """

    def __init__(self, root: Path, adapter_sha256: str, keep: int, mirror: Mirror) -> None:
        super().__init__(root, adapter_sha256, keep)
        self.mirror = mirror
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._sending: Future[None] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        save_adapter: Callable[[Path], object],
        *,
        num_ranks: int,
        zero_stage: int,
        best: bool = False,
    ) -> Path:
        """Write a checkpoint as :class:`Checkpoints` does, and begin to send it."""
        self.settle()
        folder = super().save(step, tensors, state, save_adapter, num_ranks=num_ranks, zero_stage=zero_stage, best=best)
        self._sending = self._pool.submit(self._send)
        return folder

    def _send(self) -> None:
        for name in _HISTORY:
            if (self.mirror.folder / name).is_file():
                self.mirror.push(name)
        self.mirror.push(self.root.name)

    def settle(self) -> None:
        """Wait until the last checkpoint is there.

        Raises:
            InputError: storage did not take it.
        """
        if self._sending is not None:
            self._sending.result()
            self._sending = None

    def newest(self) -> Path | None:
        """Fetch what is there and return the newest whole checkpoint."""
        for name in _HISTORY:
            self.mirror.pull(name)
        self.mirror.pull(self.root.name)
        for folder in self._folders():
            if not (folder / MANIFEST).is_file():  # its sending was cut off: it has never been one
                shutil.rmtree(folder)
        return super().newest()

    def fetch(self, step: int) -> Path:
        """Fetch a step's checkpoint and return its folder."""
        self.mirror.pull(f"{self.root.name}/{self.folder(step).name}")
        return self.folder(step)


class StoredLedger:
    """One rank's part of the ledger, sent in segments of the steps between two checkpoints.

    A resumed run begins at a checkpoint, thus at the end of a segment: rank 0 takes away those of later steps, by
    however many ranks they were written.
    """

    def __init__(self, mirror: Mirror, world: World, start_step: int) -> None:
        self.mirror, self._rank, self._from = mirror, world.rank, start_step
        self._lines: list[str] = []
        if world.rank == 0:
            for name in mirror.names(_SEGMENTS):
                if _first_step(name) >= start_step:
                    mirror.remove(name)

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Write down what this rank was given at a step."""
        entries = ({"step": step, "rank": self._rank, "task": s.task, "key": s.key} for s in samples)
        self._lines += [json.dumps(entry) + "\n" for entry in entries]

    def send(self, done: int) -> None:
        """Send the steps until the one that is done, before its checkpoint is written."""
        if self._lines:
            name = f"{_SEGMENTS}/rank-{self._rank:05d}-from-{self._from:08d}.jsonl"
            write_atomic(self.mirror.folder / name, "".join(self._lines))
            self.mirror.put(name)
            (self.mirror.folder / name).unlink()
        self._lines, self._from = [], done


class RunStore:
    """One rank's side of a run's folder on object storage; its working copy begins empty.

    Args:
        url: of the run's folder.
        world: the rank among all.
    """

    def __init__(self, url: str, world: World) -> None:
        self.folder, self.world = working_folder(url) / _RANKS / f"{world.rank:05d}", world
        """The working copy."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.mirror = Mirror(url, self.folder)
        self._ledger: StoredLedger | None = None

    def ledger(self, start_step: int) -> StoredLedger:
        """Begin this rank's part of the ledger at the step that training goes on from."""
        self._ledger = StoredLedger(self.mirror, self.world, start_step)
        return self._ledger

    def saving(self, done: int) -> None:
        """Keep for good what belongs before the checkpoint of a step; all ranks must have, before it is written."""
        if self._ledger is not None:
            self._ledger.send(done)

    def close(self) -> None:
        """Delete the working copy: all that counts is there."""
        shutil.rmtree(self.folder)

    def tell(self, path: Path) -> None:
        """Send a file of the working copy that other ranks or the driver look for."""
        self.mirror.put(path.relative_to(self.folder).as_posix())

    def hears(self, path: Path) -> bool:
        """Return whether such a file is there, and bring it here."""
        return self.mirror.fetch(path.relative_to(self.folder).as_posix())


def forget_ranks(url: str) -> None:
    """Delete what ranks that are gone have left on this machine."""
    shutil.rmtree(working_folder(url) / _RANKS, ignore_errors=True)


def fetch_ledger(mirror: Mirror) -> None:
    """Fetch all segments into the working copy, a file a rank, as :func:`pipeline.stream.merge_ledgers` takes them."""
    by_rank: dict[str, list[str]] = {}
    for name in mirror.names(_SEGMENTS):
        mirror.fetch(name)
        by_rank.setdefault(Path(name).stem.split("-")[1], []).append((mirror.folder / name).read_text())
    shutil.rmtree(mirror.folder / _SEGMENTS, ignore_errors=True)
    for rank, segments in by_rank.items():
        write_atomic(mirror.folder / f".samples-rank-{rank}.jsonl", "".join(segments))


def _first_step(name: str) -> int:
    return int(Path(name).stem.rpartition("-")[2])


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Looks now and then, in a thread, whether all shall stop, until the block ends.

    Args:
        look: does what is to be done each time.
    """

    def __init__(self, look: Callable[[], object]) -> None:
        self._look, self._ended = look, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="Watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(_ASKED_EVERY_S):
            try:
                self._look()
            except InputError as error:
                say(f"WARNING: whether training shall stop is not known at present: {error}")

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=_ASKED_EVERY_S)
