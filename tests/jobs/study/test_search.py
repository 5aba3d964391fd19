"""Which rates an arm tries, as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.study.search import RateSearch, search_rates

GRID = (0.001, 0.003, 0.01)


@pytest.mark.parametrize(
    ("measured", "widenings", "expected"),
    [
        ({}, 2, RateSearch(GRID)),
        ({0.001: 0.1, 0.003: 0.2}, 2, RateSearch((0.01,))),
        ({0.001: 0.1, 0.003: 0.3, 0.01: 0.2}, 2, RateSearch(chosen=0.003)),
        ({0.001: 0.1, 0.003: 0.2, 0.01: 0.3}, 2, RateSearch((0.0333,))),
        ({0.001: 0.3, 0.003: 0.2, 0.01: 0.1}, 2, RateSearch((0.000333,))),
        ({0.001: 0.1, 0.003: 0.2, 0.01: 0.3, 0.0333: 0.2}, 2, RateSearch(chosen=0.01)),
        ({0.001: 0.1, 0.003: 0.2, 0.01: 0.3}, 0, RateSearch(chosen=0.01, at_edge=True)),
        ({0.001: 0.3, 0.003: 0.3, 0.01: 0.3}, 0, RateSearch(chosen=0.001, at_edge=True)),
    ],
)
def test_a_grid_grows_only_where_its_best_rate_lies_at_an_edge(
    measured: dict[float, float], widenings: int, expected: RateSearch
) -> None:
    assert search_rates(GRID, measured, widenings) == expected


@given(st.lists(st.floats(0, 1), min_size=12, max_size=12), st.integers(0, 4))
def test_every_search_ends_with_the_best_of_what_it_tried(values: list[float], widenings: int) -> None:
    measured: dict[float, float] = {}
    unseen = iter(values)
    while (found := search_rates(GRID, measured, widenings)).chosen is None:
        assert not set(found.pending) & set(measured)
        measured |= {rate: next(unseen) for rate in found.pending}
    assert len(measured) <= len(GRID) + widenings
    assert measured[found.chosen] == max(measured.values())
    edges = (min(measured), max(measured))
    assert found.at_edge == (found.chosen in edges)
