"""Which learning rates an arm tries next, and which one it is judged at: decided from what was measured, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RateSearch:
    """Where an arm's search stands.

    Args:
        pending: rates to be measured before anything is decided.
        chosen: the best rate; None while some are pending.
        at_edge: whether it is the lowest or the highest of those measured.
    """

    pending: tuple[float, ...] = ()
    chosen: float | None = None
    at_edge: bool = False


def search_rates(grid: Sequence[float], measured: Mapping[float, float], widenings: int) -> RateSearch:
    """Return what an arm's search needs next.

    The grid comes first. While the best rate lies at an edge, one more beyond it is tried, by the factor between the
    last two at that edge, at most ``widenings`` times.

    Args:
        grid: rates in rising order.
        measured: rate → what it reached on the development part, the higher the better.
        widenings: how many more than the grid may be tried.
    """
    missing = tuple(rate for rate in grid if rate not in measured)
    if missing:
        return RateSearch(missing)
    rates = sorted(measured)
    best = max(rates, key=lambda rate: measured[rate])  # of equal ones the lowest
    if best not in (rates[0], rates[-1]):
        return RateSearch(chosen=best)
    if len(rates) - len(grid) >= widenings:
        return RateSearch(chosen=best, at_edge=True)
    beyond = best * (rates[-1] / rates[-2] if best == rates[-1] else rates[0] / rates[1])
    return RateSearch((float(f"{beyond:.3g}"),))
