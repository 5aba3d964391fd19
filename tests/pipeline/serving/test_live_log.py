"""Scores of live requests: kept within a size, and joined with labels that come later."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.evaluation.compare import compare
from pipeline.serving import live_log
from pipeline.serving.live_log import LiveLog, add_labels, labelled, pairs, read_state, take_back
from tests.pipeline.serving.null_model import TASKS


def _rows(count: int, first: int = 0) -> list[tuple[object, ...]]:
    """Return scores of both versions on so many requests of two rows, which the second version orders better."""
    rng, found = random.Random(first), []
    for number in range(first, first + count):
        for row in range(2):
            better = 0.9 * (number % 2) + 0.1 * rng.random()
            for model, role, score in (("old", "live", rng.random()), ("new", "shadow", better)):
                found.append(
                    (f"r{number}", row, f"i{number}-{row}", None, "clicks", model, role, score, [1 - score, score])
                )
    return found


def _labels(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_labels_find_their_rows_by_request_or_by_id_and_the_newest_counts(tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    log = LiveLog(url, 10, 60)
    log.add(_rows(40))
    log.flush()
    log.add(_rows(40, 40))
    log.flush()
    assert not log.is_due and len(list(tmp_path.glob("log/scores/*/*.parquet"))) == 2
    by_request = [{"request": f"r{n}", "row": r, "label": 1 - n % 2} for n in range(60) for r in range(2)]
    assert add_labels(url, _labels(tmp_path / "wrong.jsonl", by_request)) == 120
    by_request = [{"request": f"r{n}", "row": r, "label": (" no", " yes")[n % 2]} for n in range(60) for r in range(2)]
    add_labels(url, _labels(tmp_path / "right.jsonl", by_request))
    by_id = [{"id": f"i{n}-{r}", "label": n % 2} for n in range(60, 70) for r in range(2)]
    add_labels(url, _labels(tmp_path / "ids.jsonl", by_id))
    found = labelled(url, TASKS)
    assert len(found) == 2 * 140  # two versions
    assert all(label == int(request[1:]) % 2 for request, label in zip(found["request"], found["label"], strict=True))
    ours, theirs = pairs(found, "new", "old")
    data = {"manifest_sha256": "live", "split": "live"}
    difference = compare(ours, theirs, TASKS, candidate_name="new", reference_name="old", data=data).tasks["clicks"]
    assert difference.n == 140 and difference.verdict == "better"
    assert len(pairs(found, "new", "none")[0]) == 0


def test_the_log_stays_within_its_size_and_the_newest_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LiveLog(str(tmp_path), 1, 60)
    log._most = 100_000
    for number in range(30):
        log.add(_rows(200, 200 * number))
        log.flush()
    sizes = [path.stat().st_size for path in tmp_path.glob("scores/*/*.parquet")]
    assert len(sizes) > 1 and sum(sizes) <= 100_000
    monkeypatch.setattr(live_log, "_ROWS", 10)
    log.add(_rows(200))
    assert len(log._rows) == 200 and log.is_due


@pytest.mark.parametrize("row", [{"label": 1}, {"request": "r1"}, {"request": "r1", "row": "x", "label": 1}])
def test_a_label_that_names_no_row_is_refused_and_nothing_is_kept(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"labels\.jsonl, row 2 is none"):
        add_labels(str(tmp_path / "log"), _labels(tmp_path / "labels.jsonl", [{"id": "a", "label": 1}, row]))
    assert not list(tmp_path.glob("log/labels/*"))


def test_the_first_reason_for_which_a_challenger_was_taken_back_stays(tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    assert read_state(url) == {"taken_back": {}, "drift": []}
    take_back(url, "models:/ads/4", "it fails")
    take_back(url, "models:/ads/4", "it fails again")
    assert read_state(url)["taken_back"]["models:/ads/4"].endswith("UTC: it fails")
