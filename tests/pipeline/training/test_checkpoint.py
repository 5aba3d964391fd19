"""Checkpoints as files: whole or not there, damage noticed, another adapter refused, so many kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.contracts import CheckpointManifest
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.synthetic import synthetic_ads_tasks
from pipeline.training.checkpoint import Checkpoints, adapter_sha256, read_checkpoint

SHA = "a" * 64
TENSORS = {"weight/x": torch.arange(6.0).view(2, 3), "exp_avg/x": torch.full((2, 3), -1e-30)}


def _adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def _save(checkpoints: Checkpoints, *steps: int, best: int | None = None) -> None:
    for step in steps:
        state = {"step": step}
        checkpoints.save(step, TENSORS, state, _adapter, num_ranks=2, zero_stage=1, best=step == best)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    _save(Checkpoints(tmp_path, SHA), 50)
    folder = Checkpoints(tmp_path, SHA).newest()
    assert folder == tmp_path / "step-00000050"
    tensors, state = read_checkpoint(folder)
    assert state == {"step": 50}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    manifest = CheckpointManifest.read(folder / "manifest.json")
    assert (manifest.step, manifest.num_ranks, manifest.zero_stage) == (50, 2, 1)
    assert set(manifest.files) == {"adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json"}


def test_last_ones_are_kept_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SHA, keep=2)
    _save(checkpoints, 1, 2, 3, 4, 5, best=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoints.best() == tmp_path / "step-00000002"
    _save(checkpoints, 6, best=6)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005", "step-00000006"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "state.json", "adapter/adapter_model.safetensors", "manifest.json"]
)
def test_damaged_newest_is_put_aside_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], name: str
) -> None:
    checkpoints = Checkpoints(tmp_path, SHA)
    _save(checkpoints, 1, 2)
    path = tmp_path / "step-00000002" / name
    if name == "manifest.json" and damage is _flip:
        path.write_text(path.read_text().replace('"files": {', '"files": {"x": "0", '))
    elif name == "manifest.json" and damage is _truncate:
        path.write_bytes(path.read_bytes()[:-2])
    else:
        damage(path)
    checkpoints.refuse_foreign()  # damage is no reason to refuse
    assert checkpoints.newest() == tmp_path / "step-00000001"
    said = capsys.readouterr().err
    assert "WARNING" in said
    assert "step-00000002 is damaged" in said
    assert (tmp_path / "damaged-step-00000002").is_dir()
    assert checkpoints.newest() == tmp_path / "step-00000001"
    assert capsys.readouterr().err == ""


def test_no_whole_one_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "not_there", SHA)
    checkpoints.refuse_foreign()
    assert checkpoints.newest() is None
    _save(checkpoints, 1)
    _flip(checkpoints.folder(1) / "state.json")
    assert checkpoints.newest() is None


@pytest.mark.parametrize("when", ["adapter", "tensors", "state"])
def test_save_that_dies_leaves_what_stood(tmp_path: Path, when: str) -> None:
    checkpoints = Checkpoints(tmp_path, SHA)
    _save(checkpoints, 1)
    tensors: dict = dict(TENSORS)
    state: dict = {"step": 2}
    save_adapter = _adapter
    if when == "adapter":

        def save_adapter(folder: Path) -> None:
            _adapter(folder)
            raise KeyboardInterrupt

    elif when == "tensors":
        tensors["bad"] = None
    else:
        state["bad"] = object()
    with pytest.raises((KeyboardInterrupt, TypeError, ValueError, AttributeError)):
        checkpoints.save(2, tensors, state, save_adapter, num_ranks=1, zero_stage=0)
    assert checkpoints.newest() == tmp_path / "step-00000001"
    _save(checkpoints, 2)
    assert checkpoints.newest() == tmp_path / "step-00000002"


def test_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    _save(Checkpoints(tmp_path, SHA), 1)
    for ask in (Checkpoints.newest, Checkpoints.refuse_foreign):
        with pytest.raises(InputError, match="must be of this adapter, its tasks and its base model"):
            ask(Checkpoints(tmp_path, "b" * 64))


def test_digest_tells_adapter_tasks_and_base_apart(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (base / name).write_text("{}")
    tasks = synthetic_ads_tasks()
    this = adapter_sha256(AdapterConfig(), BaseModelConfig(base=str(base)), tasks)
    assert this == adapter_sha256(AdapterConfig(), BaseModelConfig(base=str(base), max_length=64), tasks)
    others = {
        adapter_sha256(AdapterConfig(r=4), BaseModelConfig(base=str(base)), tasks),
        adapter_sha256(AdapterConfig(), BaseModelConfig(base=str(base)), tasks[1:]),
        adapter_sha256(AdapterConfig(), BaseModelConfig(base=str(base), num_layers=2), tasks),
    }
    (base / "model.safetensors").write_text("{1}")
    others.add(adapter_sha256(AdapterConfig(), BaseModelConfig(base=str(base)), tasks))
    assert len(others - {this}) == 4


def test_state_is_plain_json(tmp_path: Path) -> None:
    _save(Checkpoints(tmp_path, SHA), 1)
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text()) == {"step": 1}


def test_a_best_one_that_is_damaged_is_said_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, SHA)
    _save(checkpoints, 1, 2, best=1)
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    assert checkpoints.best() is None
    assert "is damaged" in capsys.readouterr().err
