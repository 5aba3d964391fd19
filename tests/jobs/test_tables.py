from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import tables
from jobs.tables import sparkline


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 60))
def test_a_sparkline_has_a_block_a_value_or_as_many_as_fit(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))


def test_a_sparkline_falls_as_the_values_do() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 1]) == "▁▁▁"


def test_each_task_s_loss_is_shown_with_its_course(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"step": 2, "loss": 0.9, "task_loss": {"spam": 0.7}},
        {"step": 4, "loss": 0.5, "task_loss": {"spam": 0.3, "rare": 0.8}},
    ]
    tables.show_training(rows)
    shown = capsys.readouterr().err
    for words in ("Loss over 4 steps", "spam", "0.700", "█▁", "0.300", "rare"):
        assert words in shown
