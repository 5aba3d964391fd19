"""The rank that is solved for a size is the one whose model, really built, comes nearest."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_lora import METHODS, MTLLoRAConfig, build_adapter
from mtl_lora.errors import ConfigError
from mtl_lora.sizes import count_parameters, least_rank, solve_size, target_shapes

OTHERS = {"lora_dropout": 0.0, "target_modules": "all-linear"}


def _base():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_the_count_is_that_of_the_model_that_is_built(method, transform):
    options = {**OTHERS, "r": 5, "num_up_projections": 2, "transform": transform}
    config = MTLLoRAConfig(["a", "b", "c"], **options)
    built = build_adapter(method, _base(), ["a", "b", "c"], **options)
    assert count_parameters(method, config, target_shapes(_base(), config)) == built.count_parameters()[0]


def test_the_papers_numbers_come_out():
    config = MTLLoRAConfig([f"t{i}" for i in range(8)])
    shapes = Counter({(4096, 4096): 4 * 32})
    assert count_parameters("mtl_lora", config, shapes) == 16_845_824
    assert count_parameters("mtl_lora", config.replace(transform="diagonal"), shapes) == 16_788_480
    assert count_parameters("lora", config.replace(r=16), shapes) == 16_777_216
    assert solve_size("mtl_lora", config.replace(r=1), shapes, 16_777_216).r == 8


@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(["mtl_lora", "multilora", "moelora", "lora_per_task"]),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    tasks=st.integers(1, 6),
    ups=st.integers(1, 4),
    asked=st.integers(1, 20_000),
)
def test_no_other_rank_comes_nearer(method, sizes, tasks, ups, asked):
    config = MTLLoRAConfig([str(t) for t in range(tasks)], num_up_projections=ups)
    shapes = Counter(sizes)
    found = solve_size(method, config, shapes, asked)
    assert found.parameters == count_parameters(method, config.replace(r=found.r), shapes)
    assert found.ratio == found.parameters / asked
    for r in {max(least_rank(method, config), found.r - 1), found.r + 1}:
        assert abs(count_parameters(method, config.replace(r=r), shapes) - asked) >= abs(found.parameters - asked)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_size_of_a_method_is_its_own(method):
    config = MTLLoRAConfig(["a", "b"], num_up_projections=2, r=6)
    shapes = Counter({(12, 20): 2, (20, 12): 1})
    found = solve_size(method, config.replace(r=1), shapes, count_parameters(method, config, shapes))
    assert (found.r, found.ratio) == (6, 1.0)


def test_counting_allocates_no_weight():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(1 << 20, 1 << 20))
    config = MTLLoRAConfig(["a"], target_modules=["0"])
    assert count_parameters("lora", config, target_shapes(base, config)) == 8 * 2 * (1 << 20)


def test_an_unknown_method_or_a_size_beyond_use_is_refused():
    config, shapes = MTLLoRAConfig(["a"]), Counter({(2, 2): 1})
    with pytest.raises(ConfigError, match="got 'lorra'"):
        count_parameters("lorra", config, shapes)
    with pytest.raises(ConfigError, match="ask for less"):
        solve_size("lora", config, shapes, 1 << 30)
