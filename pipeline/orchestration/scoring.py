"""Scoring on Ray workers that hold the model, side by side."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray.util import ActorPool

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.evaluation.kept_answers import KeptAnswers, ScoredChunk
from pipeline.log_lines import name_process

_CHUNK = 64
"""Samples a call: enough to batch by length, few enough to share out evenly and to show progress."""


@dataclass(frozen=True)
class PoolScores:
    """What a pool answers."""

    probabilities: list[np.ndarray]
    """One array of class probabilities a sample, in label order, in the order of the samples."""
    states: dict[tuple[str, str], np.ndarray]
    """Task and key → hidden state (H,), of the samples for which it was asked."""
    texts: list[str | None]
    """What was written for each sample; None for a label whose words were scored."""


class ScoringPool:
    """Workers that score samples side by side.

    Args:
        load: returns, on a worker, scorers by name (see :class:`pipeline.modeling.scoring.Scorer`).
        num_workers: processes of one CPU each.
        gpus: of each, a share of one below 1; None: one where the cluster has as many as processes, else none.
        split: ``model.dtype`` of a base that is split over the processes, which then read every sample together;
            ``load`` is told so by ``asking``, see :func:`pipeline.modeling.base_model.load_base`. None: it is whole.

    Raises:
        InputError: the cluster has fewer GPUs than asked for.
    """

    def __init__(
        self, load: Callable[..., dict[str, Any]], num_workers: int, gpus: float | None = None, split: str | None = None
    ) -> None:
        have = ray.cluster_resources().get("GPU", 0)
        gpus = float(have >= num_workers) if gpus is None else gpus
        if gpus * num_workers > have:
            raise InputError(
                f"evaluation.gpus_per_worker must be at most the cluster's GPUs over the {num_workers} scoring "
                f"processes, {have / num_workers:g}, got {gpus:g}; lower it or evaluation.num_workers"
            )
        self.actors, self._teams = (
            _whole(load, num_workers, gpus) if split is None else _split(load, num_workers, gpus, split)
        )

    def score(
        self,
        samples: Sequence[Sample],
        *,
        model: str = "trained",
        on_progress: Callable[[int], object] | None = None,
        states_of: Set[tuple[str, str]] = frozenset(),
        kept: KeptAnswers | None = None,
    ) -> PoolScores:
        """Score each sample once; those of a worker that is lost are scored by another.

        Args:
            samples: of any tasks, mixed.
            model: name of the scorer that is asked.
            on_progress: called with the number of samples just scored.
            states_of: task and key of the samples whose hidden states come back too.
            kept: where answers are kept as they come, and those of an earlier call stand; None: nowhere.
        """
        # In like company there is little padding; longest first, so that no worker is left with the longest at the end.
        order = sorted(range(len(samples)), key=lambda i: -sum(map(len, samples[i].fields.values())))
        chunks = [order[first : first + _CHUNK] for first in range(0, len(order), _CHUNK)]
        probabilities: list[Any] = [None] * len(samples)
        texts: list[str | None] = [None] * len(samples)
        states: dict[tuple[str, str], np.ndarray] = {}
        calls = []

        def take(number: int, found: ScoredChunk) -> None:
            states.update(found.states)
            for i, row, text in zip(chunks[number], found.probabilities, found.texts, strict=True):
                probabilities[i], texts[i] = row, text
            if on_progress is not None:
                on_progress(len(chunks[number]))

        for number, chunk in enumerate(chunks):
            asked = [samples[i] for i in chunk]
            if kept is not None and (found := kept.find(number, asked)) is not None:
                take(number, found)
            else:
                calls.append((model, number, asked, frozenset(states_of)))
        pool = ActorPool(self._teams)
        for number, found in pool.map_unordered(lambda team, call: _together(cast(Any, team), "score", *call), calls):
            if kept is not None:
                kept.keep(number, [samples[i] for i in chunks[number]], found)
            take(number, found)
        return PoolScores(probabilities, states, texts)

    def latency_ms(self, samples: Sequence[Sample], *, model: str = "trained") -> float:
        """Return the median time in milliseconds in which one worker answers one row alone, the others idle."""
        return float(ray.get(_together(self._teams[0], "latency_ms", model, list(samples))))


def _whole(load: Callable[..., Any], num_workers: int, gpus: float) -> tuple[list[Any], list[list[Any]]]:
    """Return processes that each load the model, and the same as teams of one."""
    worker = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=2, max_task_retries=2)(_ScoringWorker)
    actors: list[Any] = [worker.remote(load) for _ in range(num_workers)]
    return actors, [[actor] for actor in actors]


def _split(load: Callable[..., Any], num_workers: int, gpus: float, dtype: str) -> tuple[list[Any], list[list[Any]]]:
    """Return processes that load the model together, which are one team."""
    # None is started again: a rank that is lost leaves the others with a part of the base.
    worker = ray.remote(num_cpus=1, num_gpus=gpus)(_ScoringRank)
    actors: list[Any] = [worker.remote(rank, num_workers) for rank in range(num_workers)]
    place = ray.get(actors[0].place.remote())
    ray.get([actor.load.remote(load, place, dtype) for actor in actors])
    return actors, [actors]


def _together(team: Sequence[Any], method: str, *arguments: Any) -> Any:
    """Call every process of a team alike and return what the first one will answer."""
    found = [getattr(actor, method).remote(*arguments) for actor in team]
    return found[0]


@contextlib.contextmanager
def scoring_pool(
    load: Callable[..., dict[str, Any]], num_workers: int, gpus: float | None = None, split: str | None = None
) -> Iterator[ScoringPool]:
    """Yield a :class:`ScoringPool` whose workers end with the block."""
    pool = ScoringPool(load, num_workers, gpus, split)
    try:
        yield pool
    finally:
        for actor in pool.actors:
            ray.kill(actor)


class _ScoringWorker:
    def __init__(self, load: Callable[[], dict[str, Any]]) -> None:
        self.scorers = load()

    def score(
        self, model: str, number: int, samples: Sequence[Sample], states_of: frozenset[tuple[str, str]]
    ) -> tuple[int, ScoredChunk]:
        answers = self.scorers[model].evaluated(samples)
        states = {(s.task, s.key): state for s, (_, state) in zip(samples, answers, strict=True)}
        asked = {name: state for name, state in states.items() if name in states_of}
        return number, ScoredChunk([r.probabilities for r, _ in answers], [r.text for r, _ in answers], asked)

    def latency_ms(self, model: str, samples: Sequence[Sample]) -> float:
        from pipeline.evaluation.predict import latency_ms

        return latency_ms(self.scorers[model], samples)


class _ScoringRank(_ScoringWorker):
    """One of the processes that a base is split over."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def place(self) -> tuple[str, int]:
        """Return the address and a free port of this process's machine, at which the ranks will meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), int(free.getsockname()[1])

    def load(self, load: Callable[..., dict[str, Any]], place: tuple[str, int], dtype: str) -> None:
        """Meet the others and load this rank's part."""
        ranks = {"RANK": self.rank, "WORLD_SIZE": self.num_ranks, "LOCAL_RANK": 0, "MASTER_PORT": place[1]}
        os.environ |= {"MASTER_ADDR": place[0]} | {name: str(value) for name, value in ranks.items()}
        name_process(rank=self.rank)
        from pipeline.training.split_base import split_scorers

        self._life = contextlib.ExitStack()
        self.scorers = self._life.enter_context(split_scorers(load, self.num_ranks, dtype))
