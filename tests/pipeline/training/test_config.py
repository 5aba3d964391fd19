from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig, deepspeed_config
from pipeline.training.engine import parameter_groups


def test_batch_is_split_over_ranks_and_accumulation() -> None:
    config = TrainingConfig(num_workers=2, global_batch_size=48, micro_batch_size=8)
    assert config.accumulation_steps == 3
    made = deepspeed_config(config, bfloat16=False)
    assert made["train_batch_size"] == 2 * 8 * made["gradient_accumulation_steps"]


@pytest.mark.parametrize(("batch", "choose"), [(7, 16), (40, 32)])
def test_batch_that_does_not_divide_is_refused_with_one_that_does(batch: int, choose: int) -> None:
    with pytest.raises(InputError, match=f"got {batch}; choose {choose}"):
        _ = TrainingConfig(num_workers=2, micro_batch_size=8, global_batch_size=batch).accumulation_steps


def test_clipping_is_always_said_to_deepspeed() -> None:
    assert deepspeed_config(TrainingConfig(gradient_clipping=0), bfloat16=True)["gradient_clipping"] == 0
    assert deepspeed_config(TrainingConfig(), bfloat16=True)["bf16"] == {"enabled": True}


def test_steps_come_from_epochs_unless_they_are_given() -> None:
    assert TrainingConfig(epochs=2.0).num_steps(30) == 60
    assert TrainingConfig(epochs=0.001).num_steps(30) == 1
    assert TrainingConfig(max_steps=7).num_steps(30) == 7


def test_mixing_logits_and_vectors_do_not_decay() -> None:
    module = nn.Module()
    module.lora_A = nn.Parameter(torch.zeros(2, 3))
    module.lora_mixing = nn.Parameter(torch.zeros(4, 2))
    module.bias = nn.Parameter(torch.zeros(3))
    module.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decayed, plain = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert decayed["params"] == [module.lora_A]
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in plain["params"]} == {id(module.lora_mixing), id(module.bias)}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="must train at least one parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)
