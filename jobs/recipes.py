"""Recipes: packaged settings with their reasons, which stand under a configuration's own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from jobs.config_file import PACKAGED
from pipeline.errors import did_you_mean

RECIPES = PACKAGED / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says beside a configuration's values: a size that is asked for leaves it no rank.

    Args:
        name: of the recipe.
        values: of the configuration.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in recipe_names():
        raise ValueError(f"recipe must be one of {recipe_names()}, got {name!r}{did_you_mean(name, recipe_names())}")
    found: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    adapter = values.get("adapter")
    if isinstance(adapter, Mapping) and adapter.get("size") is not None:
        found["adapter"] = {key: value for key, value in found["adapter"].items() if key not in ("r", "lora_alpha")}
    return found


def over_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's values over those of the recipe that it names; without one as they are.

    Raises:
        ValueError: there is no such recipe.
    """
    name = values.get("recipe")
    return _merged(read_recipe(name, values), values) if isinstance(name, str) else dict(values)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged
