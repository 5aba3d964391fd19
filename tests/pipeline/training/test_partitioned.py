"""Under ZeRO 3 no rank ever holds the whole base: it is split while it is read, and is the same base all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.training.ranks import tiny_base, tiny_encoder
from tests.processes import launch_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKER = """
import contextlib
import sys

import deepspeed
import torch

from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base, unproven_base
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import gathered_layer_by_layer, join_process_group, partitioned_loading

join_process_group()
training = TrainingConfig(num_workers=2, zero_stage=3)


def nothing(parameters, **_):
    assert not parameters, "a tensor is gathered while the base is read"
    return contextlib.nullcontext()


for folder in sys.argv[1:]:
    config = BaseModelConfig(base=folder, dtype="float32")
    with partitioned_loading(training, bfloat16=False):
        gathered, deepspeed.zero.GatheredParameters = deepspeed.zero.GatheredParameters, nothing
        unproven_base(config)
        deepspeed.zero.GatheredParameters = gathered
        split = load_base(config, asking=gathered_layer_by_layer)
    whole = load_base(config)
    assert split.config._attn_implementation == whole.config._attn_implementation
    own = dict(whole.named_parameters())
    assert {name for name, _ in split.named_parameters()} == set(own)
    for name, parameter in split.named_parameters():
        assert parameter.numel() == 0, name
        assert parameter.ds_tensor.numel() == -(-own[name].numel() // 2), name
        parameter.all_gather([parameter])
        assert torch.equal(parameter, own[name]), name
        parameter.partition([parameter])
    row = torch.arange(5, 25)[None]
    with gathered_layer_by_layer(split), torch.no_grad():
        assert torch.equal(split(input_ids=row)[0], whole(input_ids=row)[0])
    assert all(parameter.numel() == 0 for parameter in split.parameters())
    fingerprints = []
    for base in (split, whole):
        adapted = build_adapter(AdapterConfig(r=2, target_modules="all-linear"), base, ["a", "b"])
        fingerprints.append(adapted.base_fingerprint())
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] is not None
"""


def test_each_rank_reads_its_part_and_together_they_are_the_base(tmp_path: Path) -> None:
    bases = [tiny_base(tmp_path / "llama"), tiny_encoder(tmp_path / "bert")]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    codes, told = launch_ranks(script, bases, 2, timeout_s=600)
    assert codes == [0, 0], told
