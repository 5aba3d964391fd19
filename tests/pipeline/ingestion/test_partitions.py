from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.partitions import (
    Partition,
    check_clock,
    digest_partitions,
    find_partitions,
    plan_window,
)
from pipeline.stream import read_split

FIRST = dt.date(2026, 1, 5)
SPAM = TaskSpec(name="spam", template="{text}\nSpam:", label_words=(" no", " yes"))
HAM = TaskSpec(name="ham", template="{text}\nHam:", label_words=(" no", " yes"))


def day(number: int) -> dt.date:
    return FIRST + dt.timedelta(days=number)


def days(count: int, missing: set[int] = frozenset(), half: set[int] = frozenset()) -> list[Partition]:
    return [Partition(day(n), ("spam.jsonl",), 1, n not in half) for n in range(count) if n not in missing]


def write_day(
    root: Path, number: int, tasks: tuple[str, ...] = ("spam",), rows: int = 40, dated: int | None = None
) -> None:
    folder = root / day(number).isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    date = day(number if dated is None else dated).isoformat()
    for task in tasks:
        records = [
            {"id": f"{number}-{row}", "date": date, "text": f"{task} {number} {row}", "label": row % 2}
            for row in range(rows)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "_SUCCESS").touch()


@given(st.data())
def test_each_day_is_trained_on_once_whatever_the_pace(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 40), label="days")
    holdout = data.draw(st.integers(1, 3), label="holdout days")
    arrivals = sorted(data.draw(st.sets(st.integers(1, total), min_size=1), label="runs at"))
    trained: list[dt.date] = []
    until = None
    for count in arrivals:
        window = plan_window(days(count), until, as_of=day(total), holdout_days=holdout)
        if window is None:
            continue
        new = [day(n) for n in range((window.train[0] - FIRST).days, (window.train[1] - FIRST).days + 1)]
        assert not set(new) & set(trained)
        assert window.holdout == (day(count - holdout), day(count - 1))
        trained += new
        until = window.train[1]
    assert trained == [day(n) for n in range(len(trained))]
    assert len(trained) >= min(arrivals[-1] - holdout, 1)


def test_nothing_new_leaves_no_window() -> None:
    assert plan_window(days(8), day(6), as_of=day(20)) is None
    assert plan_window(days(1), None, as_of=day(20)) is None


def test_first_window_is_limited_and_later_partitions_wait() -> None:
    window = plan_window(days(30), None, as_of=day(20), window_days=7)
    assert window is not None
    assert (window.train, window.holdout) == ((day(13), day(19)), (day(20), day(20)))


def test_replay_takes_older_days_only() -> None:
    window = plan_window(days(21), day(12), as_of=day(40), replay_days=5)
    assert window is not None
    assert window.replay == (day(8), day(12))


@pytest.mark.parametrize(
    ("missing", "half", "words"), [({9}, set(), "none or no whole one"), (set(), {9}, "being written")]
)
def test_a_gap_is_refused_with_the_day(missing: set[int], half: set[int], words: str) -> None:
    with pytest.raises(InputError, match=rf"2026-01-14.*{words}|{words}.*2026-01-14"):
        plan_window(days(14, missing, half), day(6), as_of=day(40))


def test_a_known_gap_is_passed_over() -> None:
    window = plan_window(days(14, {9}), day(6), as_of=day(40), known_gaps=[day(9)])
    assert window is not None
    assert window.train == (day(7), day(12))


def test_a_partition_that_is_being_written_is_not_taken_yet() -> None:
    window = plan_window(days(14, half={13}), day(6), as_of=day(40))
    assert window is not None
    assert window.holdout == (day(12), day(12))


def test_a_clock_that_lies_behind_the_partitions_is_said() -> None:
    with pytest.raises(InputError, match="set the clock"):
        check_clock(days(3), day(0))
    check_clock(days(3), day(1))  # one day ahead is a time zone


def test_partitions_are_found_with_their_marker(tmp_path: Path) -> None:
    write_day(tmp_path, 0)
    write_day(tmp_path, 1)
    (tmp_path / day(1).isoformat() / "_SUCCESS").unlink()
    (tmp_path / "notes").mkdir()
    assert [(p.day, p.whole) for p in find_partitions(str(tmp_path))] == [(day(0), True), (day(1), False)]
    assert [p.whole for p in find_partitions(str(tmp_path), None)] == [True, True]


def test_a_root_without_partitions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="daily partitions"):
        find_partitions(str(tmp_path))


def test_a_changed_partition_has_another_digest(tmp_path: Path) -> None:
    write_day(tmp_path, 0)
    before = digest_partitions(str(tmp_path), find_partitions(str(tmp_path)))
    write_day(tmp_path, 0, rows=39)
    assert digest_partitions(str(tmp_path), find_partitions(str(tmp_path))) != before


def _prepare(
    root: Path, folder: Path, tasks: tuple[TaskSpec, ...], share: float = 0.25, gaps: tuple[int, ...] = ()
) -> ShardManifest:
    config = DataConfig.model_validate(
        {
            "source": "records",
            "root": str(root),
            "windows": {"train": [day(4), day(5)], "test": [day(6), day(6)]},
            "replay": {"window": [day(0), day(3)], "share": share},
            "gaps": [day(number) for number in gaps],
        }
    )
    return prepare(config, tasks, folder, seed=0)


def test_replay_mixes_a_drawn_share_of_older_days_into_train(tmp_path: Path) -> None:
    for number in range(7):
        write_day(tmp_path / "in", number)
    _prepare(tmp_path / "in", tmp_path / "out", (SPAM,))
    times = [sample.time for sample in read_split(tmp_path / "out" / "manifest.json", "train")]
    new = [time for time in times if time >= day(4).isoformat()]
    assert len(new) == 80  # every new record, once
    assert 20 <= len(times) - len(new) <= 60  # 40 expected of 160: within 4 standard deviations
    test = {sample.time for sample in read_split(tmp_path / "out" / "manifest.json", "test")}
    assert test == {day(6).isoformat()}


def test_a_task_may_begin_inside_the_window(tmp_path: Path) -> None:
    for number in range(7):
        write_day(tmp_path / "in", number, ("spam", "ham") if number >= 5 else ("spam",))
    manifest = _prepare(tmp_path / "in", tmp_path / "out", (SPAM, HAM))
    assert manifest.samples_of("ham", "train") == 40
    assert manifest.samples_of("ham", "test") == 40


def test_a_task_that_ends_inside_the_window_is_refused(tmp_path: Path) -> None:
    for number in range(7):
        write_day(tmp_path / "in", number, ("spam", "ham") if number == 4 else ("spam",))
    with pytest.raises(InputError, match="2026-01-10"):
        _prepare(tmp_path / "in", tmp_path / "out", (SPAM, HAM))


def test_a_record_of_another_day_is_put_aside(tmp_path: Path) -> None:
    for number in range(7):
        write_day(tmp_path / "in", number)
    path = tmp_path / "in" / day(5).isoformat() / "spam.jsonl"
    record = {"id": "late", "date": day(2).isoformat(), "text": "late", "label": 1}
    path.write_text(path.read_text() + json.dumps(record) + "\n")
    manifest = _prepare(tmp_path / "in", tmp_path / "out", (SPAM,))
    assert [(r.reason, r.records) for r in manifest.rejected] == [("record is dated another day than its partition", 1)]


def test_replay_must_lie_before_the_train_window() -> None:
    with pytest.raises(ValueError, match="must end before"):
        DataConfig.model_validate(
            {
                "source": "records",
                "root": "x",
                "windows": {"train": [day(4), day(5)]},
                "replay": {"window": [day(3), day(4)]},
            }
        )


def test_days_that_never_come_are_passed_over_in_every_window(tmp_path: Path) -> None:
    for number in (0, 1, 3, 4, 6):
        write_day(tmp_path / "in", number)
    with pytest.raises(InputError, match="missing 1"):
        _prepare(tmp_path / "in", tmp_path / "out", (SPAM,), gaps=(2,))
    manifest = _prepare(tmp_path / "in", tmp_path / "out", (SPAM,), share=1.0, gaps=(2, 5))
    assert manifest.samples_of("spam", "train") == 160
