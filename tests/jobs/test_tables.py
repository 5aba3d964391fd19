from __future__ import annotations

import pytest

from jobs import tables


def test_each_task_s_loss_is_shown_with_its_course(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"step": 2, "loss": 0.9, "task_loss": {"spam": 0.7}},
        {"step": 4, "loss": 0.5, "task_loss": {"spam": 0.3, "rare": 0.8}},
    ]
    tables.show_training(rows)
    shown = capsys.readouterr().err
    for words in ("Loss over 4 steps", "spam", "0.700", "█▁", "0.300", "rare"):
        assert words in shown
