"""A configuration is checked where it is made, with the rule, the value and the remedy."""

import pytest

from mtl_lora import MTLLoRAConfig
from mtl_lora.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0; the paper's scripts use 0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": True}, "got True"),
        ({"num_up_projections": 1.5}, "num_up_projections must be an integer >= 1, got 1.5"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_alpha": 0}, "lora_alpha must be > 0, got 0"),
        ({"transform": "none"}, "got 'none'"),
        ({"bias": "some"}, "got 'some'"),
        ({"task_names": []}, "at least one name"),
        ({"task_names": "glue"}, r"write \['glue'\]"),
        ({"task_names": ["a", "a"]}, r"unique, got \['a'\]"),
        ({"task_names": ["../a"]}, "folder's name"),
        ({"target_modules": []}, "must name a module"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MTLLoRAConfig(**{"task_names": ["a"], **options})


def test_saved_and_read_again_it_is_the_same():
    config = MTLLoRAConfig(["a", "b"], r=3, target_modules=["x"], modules_to_save=["head"], use_rslora=True)
    assert MTLLoRAConfig.from_dict(config.to_dict()) == config
    assert config.task_names == ("a", "b")


def test_defaults_are_the_papers_and_rank_stabilised_scaling_uses_the_root():
    config = MTLLoRAConfig(["a"])
    assert (config.r, config.lora_alpha, config.num_up_projections, config.temperature) == (8, 16, 3, 0.1)
    assert config.scaling == 2
    assert MTLLoRAConfig(["a"], r=16, use_rslora=True).scaling == 4
