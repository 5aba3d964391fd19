"""What surrounds one rank: the run folder's history and ledger, MLflow, being told to stop, being found hung."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.contracts import Sample
from pipeline.progress import Track, say, sparkline
from pipeline.stream import SampleLedger
from pipeline.tracking import History, Tracker
from pipeline.training.run_store import RunStore, StoredLedger, Watch
from pipeline.world import World

CHECKPOINTS, HISTORY = "checkpoints", "history.jsonl"
"""Names in a run's folder."""
LOADING_S = 600.0
"""How long a rank may load before its first step, at least: it takes what the machine and the base take."""
_CURVE = 20
"""Characters of the loss's course that is shown beside the progress."""
_terminated = threading.Event()


def listen_to_sigterm() -> None:
    """Take SIGTERM as the wish to save and stop from now on; called in the main thread of a rank's process."""
    if threading.current_thread() is not threading.main_thread():
        say("WARNING: SIGTERM cannot be listened to from here: a terminated worker goes on from the last checkpoint")
        return
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())


def stop_file(run_folder: Path) -> Path:
    """Return the file whose presence tells all ranks to save and stop."""
    return run_folder / CHECKPOINTS / ".stop"


def failed_file(run_folder: Path) -> Path:
    """Return the file in which a rank says what no restart can fix."""
    return run_folder / CHECKPOINTS / ".failed"


class RunCallbacks(contextlib.ExitStack):
    """What a rank tells and asks in a run's folder, which all ranks share; used as a context manager.

    A rank that ends no step for ``hang_timeout_s`` writes down where its threads stand and exits with code 1, and so
    do those that wait for it: the run then goes on from the newest checkpoint.

    Args:
        run_folder: holds ``checkpoints/``, ``history.jsonl`` and the ledger.
        world: the rank among all.
        hang_timeout_s: the longest that a step may take, and loading where it is more than :data:`LOADING_S`.
        tracker: MLflow run that rank 0 writes to.
        leaving: whether this rank's machine is about to go away.
        store: where the run's folder lies on object storage; ``run_folder`` is its working copy then.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        hang_timeout_s: float,
        tracker: Tracker | None = None,
        leaving: Callable[[], bool] = lambda: False,
        store: RunStore | None = None,
    ) -> None:
        super().__init__()
        self.run_folder, self.world, self.tracker = run_folder, world, tracker
        self.hang_timeout_s, self.leaving, self.store = hang_timeout_s, leaving, store
        self.start_step = 0
        self.step: int | None = None
        """The step that this rank is in; None before the first."""
        self.ledger: SampleLedger | StoredLedger | None = None
        self.track: Track | None = None
        self.losses: list[float] = []
        self.history: History | None = None
        self.callback(faulthandler.cancel_dump_traceback_later)
        self._alive()

    def _alive(self) -> None:
        limit = max(self.hang_timeout_s, LOADING_S) if self.step is None else self.hang_timeout_s
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)

    def started(self, step: int, num_steps: int) -> None:
        """Begin at a step: rows of later ones, which will be written again, are dropped."""
        self.start_step = self.step = step
        self._alive()
        if self.world.rank == 0:
            if step:
                say(f"training goes on from step {step} of {num_steps}")
            self.history = self.enter_context(History(self.run_folder / HISTORY, self.tracker, step))
            self.track = self.enter_context(Track("train", num_steps, "steps"))
            self.track.done = step
            if self.store is not None:  # all stop when one does
                self.enter_context(Watch(partial(self.store.hears, stop_file(self.run_folder))))

    def stops(self) -> bool:
        """Whether this rank is told to stop; being asked is the sign that it lives and has done a step."""
        self._alive()
        self.step = None if self.step is None else self.step + 1
        return _terminated.is_set() or self.leaving() or stop_file(self.run_folder).exists()

    def log(self, row: dict[str, Any]) -> None:
        """Write one row of the history, which goes to MLflow from there."""
        if self.history is not None:
            self.history.append(row)
        if self.track is not None:
            self.losses.append(row["loss"])
            note = f"loss {row['loss']:.3f} {sparkline(self.losses, _CURVE)} {row['tokens_per_s']:.0f} tokens/s"
            self.track.advance(row["step"] - self.track.done, note)

    def trained_on(self, step: int, rank: int, samples: Sequence[Sample]) -> None:
        """Write one step's samples into the ledger."""
        if self.ledger is None:
            self.ledger = (
                self.enter_context(SampleLedger(self.run_folder, self.world, self.start_step))
                if self.store is None
                else self.store.ledger(self.start_step)
            )
        self.ledger.record(step, samples)
