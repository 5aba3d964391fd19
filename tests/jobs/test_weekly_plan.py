"""What one retraining reads, trains and compares, as a table of facts."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.config import RetrainingConfig, RunConfig
from jobs.weekly.plan import Digests, Facts, NothingNew, RetrainingPlan, plan_retraining
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.partitions import Partition
from pipeline.promotion.provenance import Provenance
from pipeline.promotion.registry import Version

DAY = dt.date(2026, 1, 5)
TASKS = tuple(TaskSpec(name=name, template="{text_a}", label_words=(" no", " yes")) for name in ("clicks", "spam"))
DIGESTS = Digests("b" * 64, {"2026-01-05": "1"}, {})


def _days(count: int, *missing: int, whole: bool = True) -> tuple[Partition, ...]:
    files = tuple(f"{task.name}.jsonl.gz" for task in TASKS)
    days = (DAY + dt.timedelta(days=n) for n in range(count) if n not in missing)
    return tuple(Partition(day, files, 10, whole) for day in days)


def _config(tmp_path: Path, **settings: Any) -> RunConfig:
    return RunConfig(
        name="weekly",
        run_root=tmp_path,
        tasks=TASKS,
        data={"source": "records", "root": str(tmp_path)},
        retraining=RetrainingConfig(**settings),
    )


def _champion(until: dt.date | None = DAY, tasks: tuple[str, ...] = ("clicks", "spam")) -> Version:
    origin = Provenance(
        run="weekly-old", tasks=tasks, trained_until=until, base_fingerprint="b" * 64, manifest_sha256="c" * 64
    )
    return Version(3, "run id", "source", origin, ("champion",))


def _plan(config: RunConfig, facts: Facts) -> RetrainingPlan | NothingNew:
    assert config.retraining is not None
    return plan_retraining(config, config.retraining, facts)


def _facts(*partitions: Partition, champion: Version | None = None) -> Facts:
    today = DAY + dt.timedelta(days=30)
    return Facts(partitions, today, today, champion)


def test_without_a_champion_the_first_window_is_read(tmp_path: Path) -> None:
    plan = _plan(_config(tmp_path), _facts(*_days(4)))
    assert isinstance(plan, RetrainingPlan)
    assert plan.window.train == (DAY, DAY + dt.timedelta(days=2))
    assert plan.window.holdout == (DAY + dt.timedelta(days=3),) * 2
    assert (plan.bytes, plan.replayed, plan.new_tasks) == (40, (), ())


def test_with_a_champion_its_days_are_replayed_and_not_read_again(tmp_path: Path) -> None:
    facts = replace(_facts(*_days(4), champion=_champion()), earlier_manifest=str(tmp_path / "manifest.json"))
    plan = _plan(_config(tmp_path), facts)
    assert isinstance(plan, RetrainingPlan)
    assert plan.window.train == (DAY + dt.timedelta(days=1), DAY + dt.timedelta(days=2))
    assert [partition.day for partition in plan.replayed] == [DAY]
    assert plan.drift_against == str(tmp_path / "manifest.json")


def test_the_plan_says_which_models_are_scored_on_the_holdout(tmp_path: Path) -> None:
    facts, champion = _facts(*_days(4), champion=_champion()), _champion()
    for anchor, scored in ((replace(champion, number=1), ["version 3", "version 1"]), (champion, ["version 3"])):
        plan = _plan(_config(tmp_path), replace(facts, anchor=anchor))
        assert isinstance(plan, RetrainingPlan)
        summary = plan.summary(plan.config, None)
        assert summary["anchor"] == anchor.number
        assert summary["scored"] == ["challenger", "untrained base", *scored]


@pytest.mark.parametrize(("count", "words"), [(0, "has come whole"), (1, "no day is left to train on")])
def test_nothing_new_is_said_in_words(tmp_path: Path, count: int, words: str) -> None:
    found = _plan(_config(tmp_path), _facts(*_days(1 + count), champion=_champion()))
    assert isinstance(found, NothingNew)
    assert words in found.reason


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (_facts(*_days(4, 1)), "partitions must follow each other"),
        (_facts(*_days(4), champion=_champion(until=None)), "must say until which day it was trained"),
        (_facts(*_days(4), champion=_champion(tasks=("clicks", "gone"))), r"answers \['gone'\] too"),
        (replace(_facts(*_days(4)), today=DAY), "must not lie in the future"),
    ],
)
def test_facts_that_cannot_be_retrained_on_are_refused(tmp_path: Path, facts: Facts, words: str) -> None:
    with pytest.raises(InputError, match=words):
        _plan(_config(tmp_path), facts)


def test_the_champions_tasks_keep_their_places_and_new_ones_come_last(tmp_path: Path) -> None:
    config = _config(tmp_path, only_new_tasks=True)
    plan = _plan(config, _facts(*_days(4), champion=_champion(tasks=("spam",))))
    assert isinstance(plan, RetrainingPlan)
    assert plan.new_tasks == ("clicks",)
    run = plan.run_config(config.retraining, DIGESTS, tmp_path / "champion")
    assert [task.name for task in run.tasks] == ["spam", "clicks"]
    assert run.training.only_tasks == ("clicks",)
    assert run.training.warm_start == tmp_path / "champion"
    assert run.retraining is None


def test_another_base_is_refused_unless_training_begins_from_scratch(tmp_path: Path) -> None:
    other = replace(DIGESTS, base="d" * 64)
    config = _config(tmp_path)
    plan = _plan(config, _facts(*_days(4), champion=_champion()))
    assert isinstance(plan, RetrainingPlan)
    with pytest.raises(InputError, match=r"set retraining\.warm_start=false"):
        plan.run_config(config.retraining, other, tmp_path)
    scratch = _config(tmp_path, warm_start=False)
    assert plan.run_config(scratch.retraining, other, tmp_path).training.warm_start is None


def test_the_runs_name_follows_from_what_is_read(tmp_path: Path) -> None:
    config = _config(tmp_path)
    plan = _plan(config, _facts(*_days(4)))
    assert isinstance(plan, RetrainingPlan)
    names = {plan.run_config(config.retraining, digests, None).name for digests in (DIGESTS, DIGESTS)}
    names.add(plan.run_config(config.retraining, replace(DIGESTS, partitions={"2026-01-05": "2"}), None).name)
    assert len(names) == 2
    assert all(name.startswith("weekly-2026-01-08-") for name in names)
