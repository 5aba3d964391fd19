from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig, check_deepspeed, deepspeed_config
from pipeline.training.engine import parameter_groups, resume_schedule, zero_keys

DEEPSPEED = Path(__file__).resolve().parents[3] / "infra" / "deepspeed"


def test_batch_is_split_over_ranks() -> None:
    config = TrainingConfig(num_workers=2, global_batch_size=48)
    made = deepspeed_config(config, bfloat16=False)
    assert made["train_batch_size"] == 2 * made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"]


@pytest.mark.parametrize(("batch", "choose"), [(7, 8), (41, 42), (1, 2)])
def test_batch_that_the_ranks_do_not_divide_is_refused_with_one_that_they_do(batch: int, choose: int) -> None:
    with pytest.raises(InputError, match=f"got {batch}; choose {choose}"):
        _ = TrainingConfig(num_workers=2, global_batch_size=batch).rank_batch_size


@pytest.mark.parametrize(("weights", "message"), [({"clik": 2.0}, "did you mean 'click'"), ({"click": 0.0}, "> 0")])
def test_weights_of_unknown_tasks_and_of_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(task_weights=weights).check_tasks(["click", "rank"])


def test_clipping_is_always_said_to_deepspeed() -> None:
    assert deepspeed_config(TrainingConfig(gradient_clipping=0), bfloat16=True)["gradient_clipping"] == 0
    assert deepspeed_config(TrainingConfig(), bfloat16=True)["bf16"] == {"enabled": True}


def test_steps_come_from_epochs_unless_they_are_given() -> None:
    assert TrainingConfig(epochs=2.0, global_batch_size=16).num_steps(41) == 6
    assert TrainingConfig(epochs=2.0, global_batch_size=16).num_samples(41) == 82
    assert TrainingConfig(epochs=0.001).num_steps(30) == 1
    assert TrainingConfig(max_steps=7, global_batch_size=16).num_samples(30) == 112
    assert TrainingConfig(max_steps=7).num_steps(30) == 7


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="must train at least one parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


def _schedule(rates: list[float]) -> LambdaLR:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return LambdaLR(torch.optim.AdamW(groups), lambda step: 0.5**step)


@pytest.mark.parametrize("before", [[0.5, 0.1, 0.5], [0.5, 0.1], [0.1]])
def test_a_resumed_schedule_keeps_each_groups_own_rate_whatever_groups_were_saved(before: list[float]) -> None:
    saved, resumed = _schedule(before), _schedule([0.1, 0.5])
    for _ in range(3):
        saved.optimizer.step()
        saved.step()
    resume_schedule(resumed, saved.state_dict())
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [0.1 / 8, 0.5 / 8] == resumed.get_last_lr()
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr() == [0.1 / 16, 0.5 / 16]


@pytest.mark.parametrize("path", sorted(DEEPSPEED.glob("*.json")), ids=lambda path: path.stem)
def test_files_for_those_who_bring_their_own_say_what_the_typed_configuration_says(path: Path) -> None:
    stage, _, rest = path.stem.removeprefix("zero").partition("-")
    config = TrainingConfig(zero_stage=int(stage), offload_optimizer=rest == "offload")  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == deepspeed_config(config, bfloat16=False)


def test_there_is_a_file_for_every_stage() -> None:
    expected = {"zero0", "zero1", "zero2", "zero3", "zero1-offload", "zero2-offload", "zero3-offload"}
    assert {path.stem for path in DEEPSPEED.glob("*.json")} == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 3}}, "to training.zero_stage"),
        ({"fp16": {"enabled": True}}, "to model.dtype"),
        ({"gradient_clipping": 0.5}, "to training.gradient_clipping"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "choose zero_stage 3"),
        ({"zero_optimization": True}, "must be a mapping"),
    ],
)
def test_deepspeed_keys_that_are_unknown_or_contradict_are_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_deepspeed(TrainingConfig(deepspeed=extra), zero_keys())


def test_further_deepspeed_keys_are_handed_on() -> None:
    config = TrainingConfig(deepspeed={"zero_optimization": {"overlap_comm": False}}, zero_stage=1)
    check_deepspeed(config, zero_keys())
    assert deepspeed_config(config, False)["zero_optimization"] == {"stage": 1, "overlap_comm": False}


def test_offload_without_partitions_is_refused() -> None:
    with pytest.raises(ValueError, match="choose zero_stage 1, 2 or 3"):
        TrainingConfig(offload_optimizer=True, zero_stage=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "needs training.warm_start"), ({"warm_start": "a", "conflict_steps": 5}, "must be null with only_tasks")],
)
def test_new_tasks_alone_need_an_adapter_to_begin_with(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(only_tasks=("new",), **more)


def test_tasks_to_train_alone_must_be_known() -> None:
    with pytest.raises(InputError, match="got 'clik'; did you mean 'click'"):
        TrainingConfig(only_tasks=("clik",), warm_start=Path("a")).check_tasks(["click"])
