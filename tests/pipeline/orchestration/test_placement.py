"""What ranks ask of a cluster, and what no cluster could give them is refused before any work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.orchestration.placement import scaling
from pipeline.training.config import TrainingConfig

GPUS = {"CPU": 32.0, "GPU": 8.0, "memory": 256e9, "accelerator_type:H100": 2.0}


def test_a_rank_takes_a_gpu_where_the_cluster_has_any() -> None:
    on_gpus = scaling(TrainingConfig(num_workers=8), GPUS)
    assert on_gpus.use_gpu and on_gpus.resources_per_worker == {"CPU": 1, "GPU": 1}
    on_cpus = scaling(TrainingConfig(), {"CPU": 2.0})
    assert not on_cpus.use_gpu and on_cpus.resources_per_worker == {"CPU": 1}


def test_what_is_asked_for_reaches_ray() -> None:
    asked = {"CPU": 4.0, "GPU": 0.0, "memory": 16e9}
    found = scaling(
        TrainingConfig(resources_per_worker=asked, accelerator_type="H100", placement_strategy="SPREAD"), GPUS
    )
    assert not found.use_gpu
    assert found.resources_per_worker == {"CPU": 4, "memory": 16e9}
    assert (found.accelerator_type, found.placement_strategy) == ("H100", "SPREAD")
    elastic = scaling(TrainingConfig(num_workers=4, min_workers=2), GPUS)
    assert (elastic.min_workers, elastic.max_workers) == (2, 4)


@given(st.integers(1, 16), st.floats(0.25, 8), st.floats(0, 64))
def test_ranks_are_refused_exactly_where_the_cluster_has_too_little(ranks: int, each: float, have: float) -> None:
    config = TrainingConfig(num_workers=ranks, resources_per_worker={"CPU": 0, "disk": each})
    if have >= each * ranks:
        assert scaling(config, {"disk": have}).resources_per_worker == {"disk": each}
    else:
        with pytest.raises(InputError, match="num_workers must be at most"):
            scaling(config, {"disk": have})


def test_an_accelerator_that_no_node_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"'H10'.*H100"):
        scaling(TrainingConfig(accelerator_type="H10"), GPUS)
    with pytest.raises(InputError, match="leave it out"):
        scaling(TrainingConfig(accelerator_type="H100"), {"CPU": 2.0})


@pytest.mark.parametrize("asked", [{"CPU": -1}, {"GPU": 0.5}, {"GPU": 2}, {"memory": float("nan")}])
def test_amounts_that_no_rank_can_take_are_refused(asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="resources_per_worker"):
        TrainingConfig(resources_per_worker=asked)
