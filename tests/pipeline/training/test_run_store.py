"""What ranks keep of a run on storage: whole checkpoints, segments of the ledger, words to each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.mirror import Mirror
from pipeline.stream import merge_ledgers
from pipeline.training.run_store import RunStore, StoredCheckpoints, forget_ranks
from pipeline.training.run_store import fetch_ledger as fetch
from pipeline.world import World

RUN = "a" * 64


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "storage" / "run")


def _checkpoints(store: RunStore, keep: int = 2) -> StoredCheckpoints:
    return StoredCheckpoints(store.folder / "checkpoints", RUN, keep, store.mirror)


def _save(checkpoints: StoredCheckpoints, step: int, best: bool = False) -> None:
    def save_adapter(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(str(step).encode())

    tensors = {"weight": torch.full((2,), float(step))}
    checkpoints.save(step, tensors, {"step": step}, save_adapter, num_ranks=1, zero_stage=0, best=best)


def _steps(url: str, tmp_path: Path) -> list[str]:
    return sorted(
        {name.split("/")[1] for name in Mirror(url, tmp_path / "look").names("checkpoints") if "step-" in name}
    )


def test_the_newest_whole_checkpoints_are_there_and_found_by_another_machine(url: str, tmp_path: Path) -> None:
    one = _checkpoints(RunStore(url, World(0, 1)))
    for step in (1, 2, 3, 4):
        _save(one, step, best=step == 2)
    one.settle()
    assert _steps(url, tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    other = _checkpoints(RunStore(url, World(0, 1)))
    found = other.newest()
    assert found is not None
    assert found.name == "step-00000004"
    assert found.is_relative_to(other.mirror.folder)
    assert other.best() == other.folder(2)


@pytest.mark.parametrize("lost", ["manifest.json", "optimizer.safetensors"])
def test_a_checkpoint_that_is_not_whole_there_is_passed_over(url: str, tmp_path: Path, lost: str) -> None:
    one = _checkpoints(RunStore(url, World(0, 1)))
    _save(one, 1)
    _save(one, 2)
    one.settle()
    one.mirror.remove(f"checkpoints/step-00000002/{lost}")
    other = _checkpoints(RunStore(url, World(0, 1)))
    assert other.newest() == other.folder(1)
    _save(other, 2)
    other.settle()
    third = _checkpoints(RunStore(url, World(0, 1)))
    assert third.newest() == third.folder(2)


def test_storage_that_takes_no_checkpoint_ends_the_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _checkpoints(RunStore(url, World(0, 1)))

    def refuse(*_: object) -> None:
        raise InputError("storage refuses")

    monkeypatch.setattr(Mirror, "push", refuse)
    _save(one, 1)
    with pytest.raises(InputError, match="storage refuses"):
        _save(one, 2)


def test_a_ledger_gone_on_with_by_fewer_ranks_holds_each_step_once(url: str, tmp_path: Path) -> None:
    def sample(key: str) -> Sample:
        return Sample(key=key, task="asked", fields={"text": key}, label=0)

    def record(store: RunStore, first: int, steps: range) -> None:
        ledger = store.ledger(first)
        for step in steps:
            for place in range(store.world.rank, 2, store.world.num_ranks):
                ledger.record(step, [sample(f"{step}-{place}")])

    both = [RunStore(url, World(rank, 2)) for rank in (0, 1)]
    for store in both:
        record(store, 0, range(2))
    for store in both:  # before the checkpoint of step 2
        store.saving(2)
        record(store, 2, range(2, 3))
        store.saving(4)  # the checkpoint of step 4 never came
    alone = RunStore(url, World(0, 1))
    record(alone, 2, range(2, 4))
    alone.saving(4)
    run = Mirror(url, tmp_path / "driver")
    fetch(run)
    merge_ledgers(run.folder)
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == [f"{step}-{place}" for step in range(4) for place in (0, 1)]


def test_what_one_rank_tells_another_hears_and_nothing_stays(url: str, tmp_path: Path) -> None:
    one, other = (RunStore(url, World(rank, 2)) for rank in (0, 1))
    said = Path("checkpoints") / ".stop"
    assert not other.hears(other.folder / said)
    (one.folder / said).parent.mkdir()
    (one.folder / said).touch()
    one.tell(one.folder / said)
    assert other.hears(other.folder / said)
    assert (other.folder / said).is_file()
    one.close()
    assert not one.folder.exists()
    forget_ranks(url)
    assert not list((tmp_path / "cache").glob("runs/*/ranks"))
