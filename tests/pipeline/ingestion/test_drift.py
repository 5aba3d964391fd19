from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, DriftThresholds, compare_drift, prepare
from pipeline.ingestion.drift import Threshold, stability_index
from pipeline.ingestion.profile import DataProfile
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks

SPAM = TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes"))
START = SyntheticAdsConfig().start


def prepared(folder: Path, drift: float, week: int) -> Path:
    synthetic = SyntheticAdsConfig(rows_per_day=150, drift=drift)
    first = START + dt.timedelta(weeks=week)
    config = DataConfig(synthetic=synthetic, windows={"train": (first, first + dt.timedelta(days=3))})
    prepare(config, synthetic_ads_tasks(), folder, seed=0)
    return folder


def test_drift_is_found_where_there_is_some_and_not_where_there_is_none(tmp_path: Path) -> None:
    calm = compare_drift(prepared(tmp_path / "a", 0.0, 0), prepared(tmp_path / "b", 0.0, 5))
    assert calm.verdict == "ok", calm.reasons
    moved = compare_drift(prepared(tmp_path / "c", 2.0, 0), prepared(tmp_path / "d", 2.0, 5))
    assert moved.verdict in ("warn", "hold")
    assert any("new_words must be <" in reason for reason in moved.reasons)
    assert all(measures["new_words"].value > 0.05 for measures in moved.tasks.values())
    strict = DriftThresholds(new_words=Threshold(warn=0.0, hold=0.01))
    held = compare_drift(tmp_path / "c", tmp_path / "d" / "manifest.json", strict)
    assert held.verdict == "hold" and held.reasons[0].startswith("hold: ")
    with pytest.raises(InputError, match="DataProfile must be a file"):
        compare_drift(tmp_path, tmp_path / "a")


@given(counts=st.lists(st.integers(0, 50), min_size=2, max_size=10).filter(any), factor=st.integers(1, 20))
def test_equal_shares_have_no_stability_index(counts: list[int], factor: int) -> None:
    # Half a count a bin weighs more in the smaller sample: that is within what chance is granted.
    assert stability_index(counts, [factor * count for count in counts]) == pytest.approx(0, abs=0.5)
    assert stability_index(counts, counts) == 0


def test_stability_index_of_a_known_shift() -> None:
    n = 10**9
    expected = (0.6 - 0.5) * np.log(0.6 / 0.5) + (0.4 - 0.5) * np.log(0.4 / 0.5)
    assert stability_index([n // 2, n // 2], [6 * n // 10, 4 * n // 10]) == pytest.approx(expected, rel=1e-6)


def test_small_windows_of_one_distribution_rarely_warn() -> None:
    rng = np.random.default_rng(0)
    found = [
        stability_index(rng.multinomial(200, [0.3, 0.7]).tolist(), rng.multinomial(100, [0.3, 0.7]).tolist())
        for _ in range(300)
    ]
    assert np.mean(np.array(found) >= 0.1) < 0.01


def write_spam(folder: Path, name: str, texts: list[str | None]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts))


@pytest.mark.parametrize("more", [{}, {"max_samples": {"train": 5}}])
def test_the_rejected_share_is_of_invalid_records_whatever_is_sampled(tmp_path: Path, more: dict[str, Any]) -> None:
    write_spam(tmp_path, "spam/train.jsonl", [f"text {n}" for n in range(50)] + ["text 0"] * 40 + [None] * 10)
    config = DataConfig(source="records", root=str(tmp_path), max_rejected_share=1, **more)
    prepare(config, [SPAM], tmp_path / "out", seed=0)
    profile = DataProfile.read(tmp_path / "out/profile.json").tasks["spam"]
    assert (profile.scanned, profile.rejected_share) == (100, 0.1)


def test_the_rejected_share_of_appended_partitions_is_of_all_their_records(tmp_path: Path) -> None:
    write_spam(tmp_path, "2026-01-05/spam.jsonl", [f"text {n}" for n in range(8)] + [None] * 2)
    write_spam(tmp_path, "2026-01-06/spam.jsonl", [f"text {n}" for n in range(30)])
    for number, date in enumerate(("2026-01-05", "2026-01-06")):
        more: dict[str, Any] = {"max_rejected_share": 1, "max_samples": {"train": 5}}
        config = DataConfig(source="records", root=str(tmp_path), windows={"train": (date, date)}, **more)
        prepare(config, [SPAM], tmp_path / "out", seed=0, append=number > 0)
    profile = DataProfile.read(tmp_path / "out/profile.json").tasks["spam"]
    assert (profile.scanned, profile.rejected_share) == (40, 0.05)
