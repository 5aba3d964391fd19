"""What a rank holds, by counts: as DeepSpeed itself estimates it, never less with fewer ranks or a lower stage."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig, empty_base
from pipeline.training.config import TrainingConfig
from pipeline.training.counts import count_model
from pipeline.training.memory import DEVICES_GIB, LAYOUTS, RANKS, RESERVED_BYTES, Counts, rank_memory
from pipeline.training.planner import plan_layouts
from tests.pipeline.training.layouts import PARAMETERS, layout_folder

TASKS = [TaskSpec(name=f"task{i}", template="{text}", label_words=(" no", " yes")) for i in range(8)]


def counts_of(folder: Path) -> Counts:
    base = empty_base(BaseModelConfig(base=str(folder), dtype="bfloat16"), layout_only=True)
    return count_model(base, AdapterConfig(), TASKS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_layout_counts_as_the_published_model(tmp_path: Path, name: str) -> None:
    counts = counts_of(layout_folder(tmp_path, name))
    assert counts.linear + counts.plain == PARAMETERS[name]
    if name == "llama-2-7b":
        assert counts.trained == 16_845_824  # r = 8, n = 3 on q, k, v, o with 8 tasks, arXiv 2410.09437
    vocabulary, width = (32000 if name == "llama-2-7b" else 128256), (8192 if "70b" in name else 4096)
    assert counts.largest == vocabulary * width


@pytest.mark.parametrize("offload", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("nodes", "devices"), [(1, 2), (1, 4), (4, 2), (64, 8)])
def test_zero_3_of_a_model_that_is_trained_whole_is_deepspeeds_estimate(
    nodes: int, devices: int, offload: tuple[bool, bool]
) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    total, largest = 8_030_261_248, 525_336_576
    host, device, _ = estimate(total, largest, devices, nodes, *offload)
    found = rank_memory(
        Counts(0, 0, total, largest, 0, 0, 0),
        num_ranks=nodes * devices,
        zero_stage=3,
        width=2,
        offload_optimizer=offload[0],
        offload_parameters=offload[1],
    )
    assert found.device == pytest.approx(device, rel=1e-6)
    if offload[0]:
        assert found.host * devices * 1.5 == pytest.approx(host, rel=1e-6)  # its factor for buffers


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (1, 4), (64, 8)])
def test_zero_2_of_a_model_that_is_trained_whole_is_deepspeeds_estimate(
    nodes: int, devices: int, offload: bool
) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

    total = 6_738_415_616
    found = rank_memory(
        Counts(0, 0, total, 0, 0, 0, 0),
        num_ranks=nodes * devices,
        zero_stage=2,
        width=2,
        offload_optimizer=offload,
    )
    assert found.device == pytest.approx(estimate(total, devices, nodes, offload)[1], rel=1e-6)


def test_a_frozen_base_under_zero_3_is_deepspeeds_estimate_of_its_parameters(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    counts = counts_of(layout_folder(tmp_path, "llama-3.1-8b"))
    found = rank_memory(counts, num_ranks=8, zero_stage=3, width=2)
    # What only trained parameters have lies on the host there: the device is left with the parameters themselves.
    device = estimate(counts.linear + counts.plain, counts.largest, 8, 1, True, False)[1]
    assert found.weights + found.gathered == pytest.approx(device, rel=1e-6)


COUNTS = st.builds(
    Counts,
    *[st.integers(0, 10**11)] * 2,
    st.integers(1, 10**9),
    *[st.integers(1, 10**9)] * 2,
    *[st.integers(0, 10**7)] * 2,
)


@given(counts=COUNTS, power=st.integers(0, 8), layout=st.sampled_from(LAYOUTS), width=st.sampled_from([2, 4]))
def test_twice_the_ranks_never_hold_more_each(counts: Counts, power: int, layout: tuple, width: int) -> None:  # type: ignore[type-arg]
    few, many = (
        rank_memory(counts, num_ranks=ranks, width=width, tokens=64, **layout._asdict())  # type: ignore[attr-defined]
        for ranks in (2 << power, 4 << power)
    )
    assert many.device <= few.device + 4  # each part is rounded by itself
    assert many.host <= few.host + 1


@given(counts=COUNTS, ranks=st.sampled_from(RANKS), width=st.sampled_from([2, 4]))
def test_stages_partition_more_and_offloading_moves_to_the_host(counts: Counts, ranks: int, width: int) -> None:
    by_stage = [rank_memory(counts, num_ranks=ranks, zero_stage=stage, width=width) for stage in range(4)]
    for lower, higher in itertools.pairwise(by_stage[1:]):
        assert higher.device - higher.gathered <= lower.device + 4
    assert by_stage[3].weights == round((counts.linear + counts.plain) * width / ranks)
    for stage in (1, 2, 3):
        moved = rank_memory(counts, num_ranks=ranks, zero_stage=stage, width=width, offload_optimizer=True)
        assert moved.device + moved.host <= by_stage[stage].device + 4
        assert moved.optimizer == moved.gradients == 0
    four, eight = (
        rank_memory(counts, num_ranks=ranks, zero_stage=1, width=width, quantization=q) for q in ("4bit", "8bit")
    )
    assert four.weights <= eight.weights <= by_stage[1].weights


def test_a_plan_names_the_smallest_device_that_fits(tmp_path: Path) -> None:
    base = BaseModelConfig(base=str(layout_folder(tmp_path, "llama-3.1-70b")), dtype="bfloat16")
    plan = plan_layouts(base, AdapterConfig(), TASKS, TrainingConfig(activation_checkpointing=True))
    assert len(plan.cells) == len(LAYOUTS) * len(RANKS)
    for cell in plan.cells:
        need = cell.device_bytes + RESERVED_BYTES
        assert cell.fits_gib == next((gib for gib in DEVICES_GIB if need <= gib << 30), None)
    assert plan.cell("zero_stage 1", 8).device_bytes > 80 << 30
    assert plan.cell("zero_stage 3", 8).fits_gib == 24
    assert plan.cell("zero_stage 1, quantization 4bit", 1).fits_gib == 80


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a local folder with a config.json.*its weights are not needed"):
        empty_base(BaseModelConfig(base=str(tmp_path)), layout_only=True)
    with pytest.raises(InputError, match="must hold a tokenizer and safetensors weights"):
        empty_base(BaseModelConfig(base=str(layout_folder(tmp_path, "llama-2-7b"))))
