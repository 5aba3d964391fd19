"""Recipes stand under a configuration's own values, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.config import RunConfig, load_config
from jobs.config_views import as_yaml, explained
from jobs.recipes import RECIPES, recipe_names
from pipeline.errors import InputError
from pipeline.modeling.adapter_config import AdapterConfig
from pipeline.modeling.config import BaseModelConfig
from pipeline.training.config import TrainingConfig

PARTS = {"adapter": AdapterConfig, "training": TrainingConfig, "model": BaseModelConfig}


@pytest.mark.parametrize("name", recipe_names())
def test_every_number_of_a_recipe_reaches_the_run_and_is_marked(name: str, tmp_path: Path) -> None:
    said = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    rows = explained(Path("demo"), [f"run_root={tmp_path}", f"recipe={name}"])
    in_file = yaml.safe_load((RECIPES.parent / "demo.yaml").read_text())
    for part, values in said.items():
        for key, value in values.items():
            row = rows[f"{part}.{key}"]
            if key in in_file.get(part, {}):
                assert row == {"value": in_file[part][key], "from": "file"}
            else:
                assert row == {"value": value, "from": f"recipe {name}"}


def test_the_default_recipe_is_what_is_done_where_nothing_is_said() -> None:
    for part, values in yaml.safe_load((RECIPES / "default.yaml").read_text()).items():
        assert PARTS[part].model_validate(values) == PARTS[part]()


def test_the_papers_recipe_is_the_papers() -> None:
    config = RunConfig(name="x", recipe="paper")
    adapter, training = config.adapter, config.training
    assert (adapter.r, adapter.lora_alpha, adapter.num_up_projections, adapter.temperature) == (8, 16, 3, 0.1)
    assert (training.learning_rate, training.warmup_share, training.epochs) == (3e-4, 0.01, 3)
    image_text = RunConfig(name="x", recipe="paper_image_text")
    assert (image_text.adapter.r, image_text.adapter.num_up_projections, image_text.adapter.temperature) == (64, 2, 0.8)
    assert image_text.adapter.bias == "all" and image_text.adapter.train_layer_norms


def test_explicit_keys_win_in_files_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nrecipe: paper\nadapter: {r: 4}\n")
    rows = explained(path, [f"run_root={tmp_path}", "training.epochs=1"])
    assert rows["adapter.r"] == {"value": 4, "from": "file"}
    assert rows["training.epochs"] == {"value": 1.0, "from": "override"}
    assert rows["training.learning_rate"] == {"value": 3e-4, "from": "recipe paper"}
    shown = tmp_path / "shown.yaml"
    shown.write_text(as_yaml(rows))
    assert load_config(shown) == load_config(path, [f"run_root={tmp_path}", "training.epochs=1"])


def test_a_size_leaves_the_recipe_no_rank(tmp_path: Path) -> None:
    overrides = [f"run_root={tmp_path}", "recipe=paper", "adapter.size={like: lora, r: 16}"]
    config = load_config(Path("ads"), overrides)
    assert config.adapter.size is not None and config.adapter.sized(5).lora_alpha == 10
    assert load_config(config.write()) == config


def test_a_recipe_changes_no_digest_beyond_its_values(tmp_path: Path) -> None:
    with_recipe = load_config(Path("demo"), [f"run_root={tmp_path}", "recipe=default"])
    assert with_recipe.digest() == load_config(Path("demo"), [f"run_root={tmp_path}"]).digest()


def test_an_unknown_recipe_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe must be one of .*got 'papr'.*paper"):
        load_config(Path("demo"), [f"run_root={tmp_path}", "recipe=papr"])
