"""What makes two retrainings the same one, and what a backfill with a held day comes to."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.submission import _is_done_once
from jobs.config import load_config
from jobs.main_job import passed
from jobs.weekly import loop
from jobs.weekly.champion import check_unchanged
from jobs.weekly.plan import check_files
from pipeline.errors import HeldBack, InputError
from pipeline.ingestion.partitions import find_partitions
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
        return passed({"verdict": verdict if day == START else "PROMOTE", "reasons": ["why"]})

    monkeypatch.setattr(loop, "retrain", outcome)
    config = load_config(settings(tmp_path))
    with pytest.raises(HeldBack, match=START.isoformat()) as held:
        loop.backfill(config, START, START + dt.timedelta(days=7))
    assert [day["verdict"] for day in held.value.result] == [verdict, "PROMOTE"]


def test_a_replayed_day_is_part_of_the_key(tmp_path: Path) -> None:
    more = {"retraining": {"window_days": 1, "replay_days": 2}}
    bring(tmp_path / "partitions", 0, 3)
    known = _name(tmp_path, **more)
    (tmp_path / "partitions" / START.isoformat() / "_SUCCESS").unlink()
    assert _name(tmp_path, **more) != known


def test_days_that_lack_their_marker_are_named_where_nothing_is_left(tmp_path: Path) -> None:
    bring(tmp_path / "partitions", 0, 3)
    config = load_config(settings(tmp_path))
    assert "the newest 1 are for scoring" in loop.retrain(config, START, dry_run=True)["reasons"][0]
    for day in (tmp_path / "partitions").iterdir():
        (day / "_SUCCESS").unlink()
    found = loop.retrain(config, AS_OF, dry_run=True)
    assert found["verdict"] == "NOTHING_NEW"
    assert f"{START}" in found["reasons"][0]
    assert "lack _SUCCESS: still being written, or their producer does not mark them" in found["reasons"][0]


def test_a_day_without_a_task_of_the_champion_is_refused(tmp_path: Path) -> None:
    bring(tmp_path / "partitions", 0, 2)
    config = load_config(settings(tmp_path))
    known, new = [task.name for task in config.tasks[:2]], config.tasks[2].name
    days = find_partitions(str(config.data.root))
    check_files(config, config.retraining, days, known)
    for name in (known[0], new):
        next((tmp_path / "partitions" / START.isoformat()).glob(f"{name}.*")).unlink()
    days = find_partitions(str(config.data.root))
    with pytest.raises(InputError, match=rf"lacks \['{START}/{known[0]}'\] \(1 in all\)"):
        check_files(config, config.retraining, days, known)
    gap = config.retraining.model_copy(update={"known_gaps": (START,)})
    check_files(config, gap, days, known)


def test_a_champion_made_by_hand_meanwhile_ends_the_retraining() -> None:
    class Hand:
        number = 4

        def champion(self) -> Any:
            return self

    check_unchanged(Hand(), Hand(), lambda: None)
    with pytest.raises(HeldBack, match="version none; version 4 was made champion meanwhile"):
        check_unchanged(Hand(), None, lambda: None)
