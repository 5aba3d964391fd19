"""What training refuses before a cluster or a worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from jobs.config import load_config
from jobs.main_job import run_stage
from jobs.run import Run
from pipeline.errors import InputError
from pipeline.training.checkpoint import Checkpoints
from tests.jobs.test_cli import ROWS, _configuration

SMALL = ("training.global_batch_size=8", "training.micro_batch_size=4")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.num_workers=16", "training.global_batch_size=16", "training.micro_batch_size=1"], "to the 8 sam"),
        (["training.num_workers=3", "training.min_workers=1", *SMALL], "must be a multiple of num_workers = 3"),
        (["training.min_workers=3", *SMALL], "training.min_workers must be at most num_workers, 2, got 3"),
        (["model.dtype=float16", *SMALL], "model.dtype"),
        (["training.zero_stage=4", *SMALL], "training.zero_stage"),
        (["training.hang_timeout_s=0", *SMALL], "training.hang_timeout_s"),
        (
            ["adapter.parts=[vision]", "training.zero_stage=3", *SMALL],
            r"parts must be \[language\] with training.zero_",
        ),
        (["adapter.temperature_start=1", "training.zero_stage=3", *SMALL], "temperature_start must be null with"),
        (["adapter.method=lora", "training.orthogonality=1", *SMALL], "orthogonality needs adapter.method 'mtl_lora'"),
        (["model.quantization=4bit", "training.zero_stage=3", *SMALL], "quantization must be null with training.zero_"),
        (["training.orthogonality=1", "training.zero_stage=3", *SMALL], "orthogonality must be 0 with zero_stage 3"),
        (["adapter.layers_pattern=layers", *SMALL], "adapter: layers_pattern needs layers_to_transform"),
        (["adapter.r=8", "adapter.size={like: lora, r: 16}", *SMALL], "adapter.r and adapter.size exclude each other"),
    ],
)
def test_ranks_types_and_stages_that_cannot_train(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_stage(Run(load_config(_configuration(tmp_path, ROWS), overrides)), "train")
    assert not ray.is_initialized()


def test_checkpoint_of_another_adapter(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "t" / "checkpoints"
    state = {"weight/x": torch.zeros(1)}, {"step": 1}, lambda folder: folder.mkdir(parents=True)
    Checkpoints(root, "b" * 64).save(1, *state, num_ranks=1, zero_stage=2)
    with pytest.raises(InputError, match="a checkpoint must be of this adapter, its tasks and its base model"):
        run_stage(Run(load_config(_configuration(tmp_path, ROWS), SMALL)), "train")
    assert not ray.is_initialized()
