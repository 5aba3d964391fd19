"""What a search over configurations is told; imports neither torch nor Ray."""

from __future__ import annotations

import math
import random
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.settings import Settings

SEARCHED = ("seed", "tasks", "model", "adapter", "mixture", "length_grouping", "training")
"""Parts of a configuration whose keys can be searched: what trains on shards that all trials share."""


_HELD = {
    "training.validation": "it judges all trials alike",
    "training.num_workers": "each trial trains in one process",
    "training.min_workers": "each trial trains in one process",
}
"""Keys within them that cannot be searched, and why."""


class Range(Settings):
    """The values of one key, told by exactly one of its keys."""

    choice: tuple[Any, ...] | None = None
    """These, each as likely."""
    uniform: tuple[float, float] | None = None
    """Numbers from low to high."""
    log_uniform: tuple[float, float] | None = None
    """Numbers above zero from low to high, their logarithms evenly."""
    integers: tuple[int, int] | None = None
    """Whole numbers from low to high, both among them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        told = {key: value for key, value in self if value is not None}
        if len(told) != 1:
            raise ValueError(
                f"a searched key needs exactly one of choice, uniform, log_uniform and integers, got {sorted(told)}; "
                "write for example {log_uniform: [1.0e-4, 1.0e-2]}"
            )
        (kind, values), *_ = told.items()
        if kind == "choice" and not values:
            raise ValueError("choice must name at least one value, got none; name some")
        if kind != "choice" and not values[0] < values[1]:
            raise ValueError(f"{kind} must go from low to high, got {list(values)}; swap or change them")
        if kind == "log_uniform" and values[0] <= 0:
            raise ValueError(f"log_uniform must be above zero, got {list(values)}; raise the lower end")
        return self

    def draw(self, random_numbers: random.Random) -> Any:
        """Return one of the values."""
        if self.choice is not None:
            return random_numbers.choice(self.choice)
        if self.integers is not None:
            return random_numbers.randint(*self.integers)
        if self.uniform is not None:
            return random_numbers.uniform(*self.uniform)
        low, high = self.log_uniform or (1.0, 1.0)
        return math.exp(random_numbers.uniform(math.log(low), math.log(high)))


class Halving(Settings):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): trials that fall behind are ended early."""

    grace_steps: int = Field(ge=1)
    """Optimizer steps that every trial is given."""
    reduction: int = Field(default=3, ge=2)
    """At ``grace_steps`` times each power of it, one in so many goes on."""


class TuneConfig(Settings):
    """A search over keys of this configuration, judged on its validation split."""

    space: dict[str, Range] = Field(min_length=1)
    """Key of this configuration, such as ``training.learning_rate``, → its values."""
    trials: int = Field(default=16, ge=1)
    """Configurations that are tried; the first is this one as it stands."""
    metric: str = "macro"
    """``macro``, the mean over the tasks, or a task: its metric, on ``training.validation.split``."""
    asha: Halving | None = None
    """Ends trials that fall behind; null: each does all its steps."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Most trials at a time, each on one CPU or GPU; null: as many as the cluster has."""
    seed: int = Field(default=0, ge=0)
    """Of the values that are drawn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if foreign := sorted(key for key in self.space if key.partition(".")[0] not in SEARCHED):
            raise ValueError(
                f"tune.space must name keys of {', '.join(SEARCHED)}, since all trials share their shards, got "
                f"{foreign}; take them out"
            )
        for key in self.space:
            for held, why in _HELD.items():
                if f"{key}.".startswith(f"{held}.") or held.startswith(f"{key}."):
                    raise ValueError(f"tune.space must leave {held} alone, since {why}, got {key}; take it out")
        return self

    def drawn(self, trial: int) -> dict[str, Any]:
        """Return the values of a trial by key: none for the first, and for each other one the same ones always."""
        if trial == 0:
            return {}
        return {key: values.draw(random.Random(f"{self.seed}/{trial}/{key}")) for key, values in self.space.items()}
