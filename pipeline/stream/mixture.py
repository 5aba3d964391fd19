"""How much of each task a stream gives: typed mixtures, resolved to whole numbers of samples.

A mixture is resolved against the tasks' sample counts into *quotas*: so many samples of each task in one period, which
then repeats. Whole numbers make the shares exact and the interleaving the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from pipeline.errors import InputError, did_you_mean
from pipeline.settings import Settings


class Proportional(Settings):
    """Each sample exactly once an epoch, unless a cap or a number of epochs says otherwise."""

    kind: Literal["proportional"] = "proportional"
    """Names this mixture."""
    caps: dict[str, int] = Field(default_factory=dict)
    """Task → at most so many of its samples an epoch; the next epoch goes on where this one stopped."""
    epochs: dict[str, float] = Field(default_factory=dict)
    """Task → how often its samples are given in one epoch of the stream; 1 where it is not named."""


class Temperature(Settings):
    """Shares proportional to n^(1/temperature): 1 is proportional, large values approach equal shares."""

    kind: Literal["temperature"] = "temperature"
    """Names this mixture."""
    temperature: float = Field(default=2.0, gt=0)
    """Exponent's inverse: 1 is proportional to the tasks' samples, larger values are more even."""
    caps: dict[str, int] = Field(default_factory=dict)
    """Task → count it as having at most so many samples."""


class Weights(Settings):
    """Fixed shares, exact in every block of samples."""

    kind: Literal["weights"] = "weights"
    """Names this mixture."""
    weights: dict[str, float]
    """Task → weight; every task of the split must be named, and weight 0 leaves it out."""
    block_samples: int = Field(default=1000, ge=1)
    """Counts are exact in each block of so many samples, by largest remainder."""


class LossDriven(Settings):
    """Shares that follow the tasks' losses, changed at stated steps only.

    At each update the share of a task is its first share times (loss / first loss)^alpha, normalised: a task that
    learns slower than the others is given more (the relative inverse training rate of GradNorm, arXiv 1711.02257).
    The losses are told by ``MixedStream.update_mixture``; the shares so far are part of ``MixedStream.state_dict``.
    """

    kind: Literal["loss_driven"] = "loss_driven"
    """Names this mixture."""
    every_steps: int = Field(ge=1)
    """Steps between two updates; losses must be told before each step that is a multiple of it."""
    alpha: float = Field(default=1.0, ge=0)
    """0 never changes the shares."""
    temperature: float = Field(default=1.0, gt=0)
    """The first shares are proportional to n^(1/temperature)."""
    min_share: float = Field(default=0.01, ge=0, lt=1)
    """No task gets less, nor less than one sample in a block."""
    block_samples: int = Field(default=1000, ge=1)
    """Counts are exact in each block of so many samples, by largest remainder."""


AnyMixture = Proportional | Temperature | Weights | LossDriven
Mixture = Annotated[AnyMixture, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[AnyMixture] = TypeAdapter(Mixture)


@dataclass(frozen=True)
class Quotas:
    """A mixture resolved: ``counts[t]`` samples of task t in each period of ``sum(counts)``."""

    tasks: tuple[str, ...]
    counts: tuple[int, ...]
    requested: tuple[float, ...]
    """Shares as asked for, which rounding to whole samples may miss by a little."""

    @property
    def period(self) -> int:
        """Samples in one period."""
        return sum(self.counts)


def parse_mixture(mixture: str | Mapping[str, object] | Settings) -> AnyMixture:
    """Return the typed mixture of a name, a mapping or a mixture.

    Raises:
        InputError: no such mixture, or settings it does not have.
    """
    if isinstance(mixture, AnyMixture):
        return mixture
    try:
        return _ADAPTER.validate_python({"kind": mixture} if isinstance(mixture, str) else mixture)
    except ValueError as error:
        raise InputError(
            f"mixture must be 'proportional', 'temperature', {{'kind': 'weights', 'weights': {{task: weight}}}} or "
            f"{{'kind': 'loss_driven', 'every_steps': 100}}, "
            f"got {mixture!r}: {error}"
        ) from error


def resolve(mixture: AnyMixture, samples: Mapping[str, int]) -> Quotas:
    """Return the quotas of a mixture over tasks with so many samples each.

    Raises:
        InputError: the mixture names an unknown task, or leaves a task without a single sample.
    """
    tasks = tuple(sorted(samples))
    if isinstance(mixture, Weights):
        return _weighted(mixture, tasks)
    if isinstance(mixture, LossDriven):
        first = np.array([samples[t] for t in tasks], dtype=float) ** (1 / mixture.temperature)
        return loss_driven_quotas(mixture, tasks, first / first.sum(), np.ones(len(tasks)))
    _check_names(mixture.caps, tasks, "caps")
    sizes = np.array([min(samples[t], mixture.caps.get(t, samples[t])) for t in tasks], dtype=float)
    if isinstance(mixture, Temperature):
        shares = sizes ** (1 / mixture.temperature)
        return _rounded(tasks, shares / shares.sum(), sum(samples.values()))
    _check_names(mixture.epochs, tasks, "epochs")
    counts = tuple(
        min(round(samples[t] * mixture.epochs.get(t, 1.0)), mixture.caps.get(t, math.ceil(samples[t] * 1e6)))
        for t in tasks
    )
    if not any(counts) or min(counts) < 0:
        raise InputError(f"a mixture must give samples, got {dict(zip(tasks, counts, strict=True))}; raise the epochs")
    total = sum(counts)
    return Quotas(tasks, counts, tuple(count / total for count in counts))


def loss_driven_quotas(
    mixture: LossDriven, tasks: tuple[str, ...], first_shares: np.ndarray, loss_ratios: np.ndarray
) -> Quotas:
    """Return the quotas at one update; ``loss_ratios`` are loss / first loss, task by task.

    Raises:
        InputError: the smallest share is larger than an equal one.
    """
    least = max(mixture.min_share, 1 / mixture.block_samples)
    if least * len(tasks) > 1:
        raise InputError(
            f"min_share and 1 / block_samples must be <= 1 / {len(tasks)} tasks = {1 / len(tasks):.3g}, got "
            f"{mixture.min_share} and {1 / mixture.block_samples:.3g}; lower the one or raise block_samples"
        )
    shares = first_shares * loss_ratios**mixture.alpha
    return _rounded(tasks, _raised(shares / shares.sum(), least), mixture.block_samples)


def _raised(shares: np.ndarray, least: float) -> np.ndarray:
    """Raise shares below ``least`` to it, and lower the others in proportion."""
    low = np.zeros(len(shares), dtype=bool)
    while True:
        scaled = np.where(low, least, shares * (1 - least * low.sum()) / max(shares[~low].sum(), 1e-300))
        below = ~low & (scaled < least)
        if not below.any():
            return scaled
        low |= below


def _weighted(mixture: Weights, tasks: tuple[str, ...]) -> Quotas:
    _check_names(mixture.weights, tasks, "weights")
    if missing := sorted(set(tasks) - set(mixture.weights)):
        raise InputError(f"mixture weights must name every task, {missing} are missing; give them a weight (or 0)")
    weights = np.array([mixture.weights[t] for t in tasks], dtype=float)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise InputError(f"mixture weights must be >= 0 with one above 0, got {mixture.weights}; fix the weights")
    return _rounded(tasks, weights / weights.sum(), mixture.block_samples)


def _rounded(tasks: tuple[str, ...], shares: np.ndarray, total: int) -> Quotas:
    counts = largest_remainder(shares, total)
    for task, share, count in zip(tasks, shares, counts, strict=True):
        if share > 0 and count == 0:
            raise InputError(
                f"task {task!r} must get at least 1 sample of each {total}, its share {share:.2g} gives none; "
                f"raise its weight or block_samples to {math.ceil(1 / share)}"
            )
    return Quotas(tasks, counts, tuple(float(share) for share in shares))


def largest_remainder(shares: np.ndarray, total: int) -> tuple[int, ...]:
    """Return whole numbers that add up to ``total`` and are nearest to the shares; ties go to the earlier task."""
    exact = np.asarray(shares, dtype=float) * total
    counts = np.floor(exact).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return tuple(int(count) for count in counts)


def _check_names(named: Mapping[str, object], tasks: tuple[str, ...], what: str) -> None:
    for name in named:
        if name not in tasks:
            raise InputError(f"mixture {what} must name tasks of the split, got {name!r}{did_you_mean(name, tasks)}")
