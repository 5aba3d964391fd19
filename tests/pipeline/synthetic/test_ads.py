from __future__ import annotations

import datetime as dt
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import PROBABILITIES_FIELD
from pipeline.ingestion import DataConfig, prepare
from pipeline.synthetic import TASKS, SyntheticAdsConfig, generate, synthetic_ads_tasks, write_partition

DAY = dt.date(2026, 1, 7)


def test_a_day_is_a_pure_function_of_seed_and_day() -> None:
    config = SyntheticAdsConfig(rows_per_day=20)
    assert generate(config, DAY) == generate(config.model_copy(update={"days": 99}), DAY)
    assert generate(config, DAY) != generate(config, DAY + dt.timedelta(days=1))
    assert generate(config, DAY) != generate(config.model_copy(update={"seed": 1}), DAY)


@pytest.mark.parametrize("task", TASKS)
def test_labels_follow_their_known_probabilities(task: str) -> None:
    records = generate(SyntheticAdsConfig(rows_per_day=3000), DAY)[task]
    known = np.array([record[PROBABILITIES_FIELD] for record in records])
    labels = np.array([record["label"] for record in records])
    assert np.allclose(known.sum(axis=1), 1)
    for label in range(known.shape[1]):
        # A sum of independent draws: within 4 standard deviations of its mean.
        spread = np.sqrt((known[:, label] * (1 - known[:, label])).sum())
        assert abs((labels == label).sum() - known[:, label].sum()) <= 4 * spread


def test_drift_brings_new_brands_and_none_without_it() -> None:
    def words(drift: float, week: int) -> set[str]:
        config = SyntheticAdsConfig(rows_per_day=400, drift=drift)
        records = generate(config, config.start + dt.timedelta(weeks=week))["ad_landing_page_consistency"]
        return {record["title"].split()[0] for record in records}

    assert words(0.0, 0) == words(0.0, 6)
    assert len(words(1.0, 0) & words(1.0, 6)) < len(words(1.0, 0)) / 4


def test_best_attainable_is_high_and_below_one(tmp_path: Path) -> None:
    manifest = prepare(DataConfig(), synthetic_ads_tasks(), tmp_path, seed=0)
    assert set(manifest.best_attainable) == set(TASKS)
    assert all(0.85 < value < 0.99 for value in manifest.best_attainable.values())
    assert manifest.window == ("2026-01-05", "2026-01-12")


def test_partitions_on_disk_give_the_same_samples_as_made_ones(tmp_path: Path) -> None:
    synthetic = SyntheticAdsConfig(days=3, rows_per_day=10)
    for offset in range(3):
        paths = write_partition(synthetic, synthetic.start + dt.timedelta(days=offset), tmp_path / "in")
    assert json.loads(gzip.decompress(paths[0].read_bytes()).splitlines()[0])["date"] == "2026-01-07"
    windows = synthetic.windows()
    made = prepare(DataConfig(synthetic=synthetic), synthetic_ads_tasks(), tmp_path / "made", seed=0)
    config = DataConfig(source="records", root=str(tmp_path / "in"), windows=windows)
    read = prepare(config, synthetic_ads_tasks(), tmp_path / "read", seed=0)
    assert [s.sha256 for s in made.shards] == [s.sha256 for s in read.shards]
    assert made.best_attainable == read.best_attainable
