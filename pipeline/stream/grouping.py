"""Length grouping inside the deterministic order: batches of like lengths, so that little is padding.

The samples of a window of steps are sorted by length and cut into batches, and the batches shuffled. A window never
reaches over a step that begins another epoch or another mixture, so each sample still comes once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from pipeline.settings import Settings


class LengthGrouping(Settings):
    """How far samples move to find others of their length."""

    window_steps: int = Field(default=64, ge=2)
    """Steps whose samples are sorted together: larger windows pad less and shuffle less."""
    by_beginning: bool = False
    """Keep samples of a task together whose first text is the same (an offer and its rivals, a query and its ads):
    what their prompts begin with is then computed once. Pays with windows of hundreds of steps."""


def window_of(step: int, window_steps: int, batch: int, epoch_samples: int, update_steps: int | None) -> range:
    """Return the steps that are grouped together with a step; of length 1 where an epoch begins within the step."""

    def alone(other: int) -> bool:
        return (other * batch) // epoch_samples != ((other + 1) * batch - 1) // epoch_samples

    if alone(step):
        return range(step, step + 1)
    start = step // window_steps * window_steps
    stop = start + window_steps
    if update_steps:
        start = max(start, step // update_steps * update_steps)
        stop = min(stop, (step // update_steps + 1) * update_steps)
    # Epochs begin at multiples of epoch_samples: the steps around `step` that share its epoch, without walking.
    epoch = step * batch // epoch_samples
    start = max(start, -(-epoch * epoch_samples // batch))
    stop = min(stop, (epoch + 1) * epoch_samples // batch)
    return range(start, stop)


def grouped(
    lengths: Sequence[int] | np.ndarray, batch: int, entropy: list[int], units: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Return for each step of a window which of the window's samples it takes.

    Args:
        lengths: of the window's samples.
        batch: samples a step.
        entropy: of the shuffle of the steps.
        units: samples of the same unit stay side by side; None where there are none.
    """
    array = np.asarray(lengths)
    unit = np.arange(len(array)) if units is None else np.asarray(units)
    longest = np.zeros(unit.max() + 1, dtype=array.dtype)
    np.maximum.at(longest, unit, array)
    batches = np.lexsort((array, unit, longest[unit])).reshape(-1, batch)
    return [batches[place] for place in np.random.default_rng(entropy).permutation(len(batches))]


def padding_share(slices: Sequence[Sequence[int]], rows: int) -> float:
    """Return the share of padding where each slice is cut into micro-batches, and each padded to its longest row."""
    tokens = sum(map(sum, slices))
    padded = sum(sum(padded_lengths(part, rows)) for part in slices)
    return 1 - tokens / padded if padded else 0.0


def padded_lengths(lengths: Sequence[int], rows: int) -> list[int]:
    """Return to which length each row of a slice is padded: to the longest of its micro-batch."""
    batches = [lengths[first : first + rows] for first in range(0, len(lengths), rows)]
    return [max(batch) for batch in batches for _ in batch]
