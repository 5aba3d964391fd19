"""What makes two retrainings the same one, and what a backfill with a held day comes to."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from jobs import retrain as loop
from jobs.config import load_config
from jobs.submission import _is_done_once
from pipeline.errors import HeldBack
from tests.jobs.weekly import START, bring, settings

AS_OF = START + dt.timedelta(days=2)


def _name(folder: Path, **more: Any) -> str:
    config = load_config(settings(folder, **more))
    return str(loop.retrain(config, AS_OF, dry_run=True)["run"])


def test_the_key_holds_all_that_decides_and_nothing_else(tmp_path: Path) -> None:
    bring(tmp_path / "partitions", 0, 3)
    known = _name(tmp_path)
    assert known.startswith("weekly-2026-01-07-")
    assert _name(tmp_path) == known
    assert _name(tmp_path, retraining={"lease_ttl_s": 60}) == known
    others = {
        _name(tmp_path, promotion={"gates": {"beat_base": False, "gain": "none", "margin": 0.5, "min_samples": 1}}),
        _name(tmp_path, retraining={"max_champion_drop": 0.1}),
        _name(tmp_path, training={"learning_rate": 0.002}),
    }
    bring(tmp_path / "partitions", 0, 3, tasks=3)  # the same days with other records
    others.add(_name(tmp_path))
    assert len(others) == 4
    assert known not in others


def test_only_work_that_follows_from_its_configuration_is_done_once(tmp_path: Path) -> None:
    config = load_config(settings(tmp_path))
    assert _is_done_once("train", config)
    assert not _is_done_once("retrain", config)
    assert _is_done_once("retrain", config.model_copy(update={"retraining": None}))
    assert not _is_done_once("promote", config)


@pytest.mark.parametrize("verdict", ["HOLD", "REJECT"])
def test_backfill_goes_on_after_a_held_day_and_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    def outcome(config: Any, day: dt.date) -> dict[str, Any]:
        return loop.passed({"verdict": verdict if day == START else "PROMOTE", "reasons": ["why"]})

    monkeypatch.setattr(loop, "retrain", outcome)
    config = load_config(settings(tmp_path))
    with pytest.raises(HeldBack, match=START.isoformat()) as held:
        loop.backfill(config, START, START + dt.timedelta(days=7))
    assert [day["verdict"] for day in held.value.result] == [verdict, "PROMOTE"]
