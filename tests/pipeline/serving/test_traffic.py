"""Who sees a live request, and when a canary is taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.server_config import CanaryConfig
from pipeline.serving.traffic import Seen, fault, miscalibrated, part_of

LIMITS = CanaryConfig(share=0.1, min_requests=200)


@given(key=st.text(), salt=st.text())
def test_a_key_has_one_place(key: str, salt: str) -> None:
    assert 0 <= part_of(salt, key) < 1
    assert part_of(salt, key) == part_of(salt, key)


def test_keys_are_spread_evenly_and_anew_with_another_salt() -> None:
    places = np.array([[part_of(salt, str(key)) for key in range(5000)] for salt in ("one", "two")])
    assert np.abs(np.histogram(places[0], 10, (0, 1))[0] - 500).max() < 100
    assert abs(np.corrcoef(places)[0, 1]) < 0.05


def _seen(rng: np.random.Generator, count: int, mean: float = 0.3, seconds: float = 0.05, errors: int = 0) -> Seen:
    found = Seen()
    for number in range(count):
        score = float(np.clip(rng.normal(mean, 0.1), 0, 1))
        answers = None if number < errors else [("clicks", score, int(score > 0.5), "yes", [1 - score, score])]
        found.note(seconds * float(rng.uniform(0.5, 1.5)), answers)
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"mean": 0.32}, None),
        ({"mean": 0.6}, "its mean score of 'clicks' is 0."),
        ({"mean": 0.1}, "its mean score of 'clicks' is 0.1"),
        ({"seconds": 0.2}, "its 95th percentile is"),
        ({"seconds": 0.06}, None),
        ({"errors": 3}, None),
        ({"errors": 20}, "it fails at 6.67% of its requests, the champion at 0.00%"),
        ({"count": 199, "errors": 199}, None),
    ],
)
def test_a_canary_is_taken_back_where_it_falls_behind(options: dict[str, float], words: str | None) -> None:
    rng = np.random.default_rng(0)
    canary = _seen(rng, **{"count": 300, **options})  # type: ignore[arg-type]
    found = fault(canary, _seen(rng, 3000), LIMITS)
    assert found is None if words is None else found is not None and found.startswith(words)


def test_like_versions_are_never_taken_back() -> None:
    rng = np.random.default_rng(1)
    assert not [1 for _ in range(200) if fault(_seen(rng, 250), _seen(rng, 400), LIMITS)]


def test_expected_positives_are_held_against_those_that_came() -> None:
    rng = np.random.default_rng(2)
    p, ratio = rng.uniform(0, 0.4, 1000).tolist(), (0.67, 1.5)
    good = {"clicks": (rng.uniform(size=1000) < p).astype(float).tolist()}
    assert miscalibrated({"clicks": p}, good, 200, ratio) is None
    assert miscalibrated({"clicks": p[:100]}, {"clicks": [0.0] * 100}, 200, ratio) is None
    few = {"clicks": (rng.uniform(size=1000) < np.array(p) / 3).astype(float).tolist()}
    found = miscalibrated({"clicks": p}, few, 200, ratio)
    assert found is not None and "positives of 'clicks' among 1000 rows" in found
