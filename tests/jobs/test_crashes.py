"""The weekly loop killed after every stage ends as the unbroken one does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.config import load_config
from tests.jobs.weekly import bring, champion_folder, registry_of, retrain, settings, start
from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STAGES = ("shards/manifest.json", "checkpoints/*", "adapter/predictor.json", "evaluation.json", "decision.json")


@pytest.mark.nightly
def test_killed_after_every_stage_the_end_is_the_same(tmp_path: Path) -> None:
    _ends_as_the_unbroken_one(tmp_path, STAGES, at_least=4)  # one stage may be over before the kill comes


@pytest.mark.nightly
def test_killed_in_training_and_before_its_promotion_the_end_is_the_same(tmp_path: Path) -> None:
    _ends_as_the_unbroken_one(tmp_path, ("checkpoints/*", "decision.json"), at_least=1)


def _ends_as_the_unbroken_one(tmp_path: Path, stages: Sequence[str], at_least: int) -> None:
    ends = []
    for folder in (tmp_path / "broken", tmp_path / "unbroken"):
        folder.mkdir()
        bring(folder / "partitions", 0, 3)
        path = settings(folder, training={"num_workers": 1}, evaluation={"num_workers": 1})
        killed = [stage for stage in stages if kill_at(path, stage)] if folder.name == "broken" else []
        out = retrain(path)
        assert '"verdict"' in out
        ends.append((_state(path), _digest(champion_folder(path) / "adapter" / "adapter_model.safetensors")))
        if folder.name == "broken":
            assert len(killed) >= at_least, killed
    assert ends[0] == ends[1]


def kill_at(path: Path, stage: str) -> bool:
    """Run until a stage's file is there, then kill everything; False if the run ended first."""
    process = start(path)
    root = load_config(path).run_root
    try:
        end = time.monotonic() + 900
        while time.monotonic() < end:
            if any(found for one in stage.split("|") for found in _files(root, one)):
                return process.poll() is None
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        raise AssertionError(f"{stage} was not reached")
    finally:
        kill_tree(process)
        time.sleep(6)  # the lease of the killed one expires


def _files(root: Path, stage: str) -> Iterator[Path]:
    yield from root.glob(f"weekly-2026-*/{stage}")


def _state(path: Path) -> dict[str, Any]:
    registry = registry_of(path)
    champion = registry.champion()
    assert champion is not None
    versions = registry._client.search_model_versions(f"name = '{registry.name}'")
    return {
        "champion": champion.number,
        "aliases": champion.aliases,
        "versions": len(versions),
        "ledger": [(entry.action, entry.version) for entry in registry.ledger.chain()],
        "trained_until": champion.provenance.trained_until,
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
