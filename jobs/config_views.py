"""The configuration explained: the resolved one with where each value came from, and its JSON Schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.config import RunConfig, in_full, load_config
from jobs.config_file import BY_BASE, EXTENDS, read_values
from jobs.recipes import read_recipe
from pipeline.modeling.size_plan import AdapterSizes

Origin = str
"""``default``, ``recipe NAME``, ``file``, ``override`` or ``resolved``: filled in from this machine or environment."""


def explained(path: Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return each key of the resolved configuration with its value and where that came from.

    Args:
        path: of the configuration, or the name of a packaged one.
        overrides: ``key.sub=value``, over the file's.

    Raises:
        InputError: whatever :func:`jobs.config.load_config` refuses.
    """
    config = load_config(path, overrides)
    found, written = dict(_leaves(config.shown())), dict(_leaves(in_full(read_values(path, overrides))))
    defaults = dict(_leaves(RunConfig.model_construct().model_dump(mode="json")))
    recipe = dict(_leaves(read_recipe(config.recipe, config.model_dump()))) if config.recipe is not None else {}
    told = [override.partition("=")[0] for override in overrides]
    rows = {}
    for key, value in found.items():
        if any(_covers(over, key) for over in told):
            origin = "override"
        elif any(_covers(each, key) for each in written):
            origin = "file"
        elif any(_covers(each, key) for each in recipe):
            origin = f"recipe {config.recipe}"
        else:
            origin = "default" if key not in defaults or defaults[key] == value else "resolved"
        rows[key] = {"value": value, "from": origin}
    return rows


def sizes(path: Path, overrides: Sequence[str] = ()) -> AdapterSizes | None:
    """Return what each method counts at the size that a configuration asks for, None where it asks for none.

    Raises:
        InputError: whatever :func:`jobs.config.load_config` refuses, or the base or a target is not there.
    """
    config = load_config(path, overrides)
    if config.adapter.size is None:
        return None
    from pipeline.modeling.adapter import adapter_as_trained

    return adapter_as_trained(config.adapter, config.model, len(config.tasks), config.training.warm_start)[1]


def as_yaml(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return explained keys as YAML that may be read again, each value's origin as a comment."""
    lines: list[str] = []
    open_keys: tuple[str, ...] = ()
    for key, row in rows.items():
        *parents, last = key.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(open_keys, parents, strict=False)) if a != b), None)
        shared = min(len(open_keys), len(parents)) if shared is None else shared
        lines += [f"{'  ' * depth}{parent}:" for depth, parent in enumerate(parents) if depth >= shared]
        open_keys = tuple(parents)
        # JSON is YAML, on one line and without surprises: a text that reads as a number keeps its quotes.
        value = json.dumps(row["value"], ensure_ascii=False)
        lines.append(f"{'  ' * len(parents)}{last}: {value}  # {row['from']}")
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, every key with its description."""
    found = RunConfig.model_json_schema(by_alias=True)
    found |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mtl-lora configuration"}
    name = {"type": "string"}
    found["properties"][EXTENDS] = {
        "anyOf": [name, {"type": "array", "items": name, "minItems": 1}],
        "description": "Configurations, packaged or by their path from this file, over whose values this file's stand.",
    }
    found["properties"][BY_BASE] = {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "description": "Settings by the value of model.base: those of the base that is taken stand over the rest.",
    }
    tasks = found["properties"]["tasks"]
    listed_task = found["$defs"]["TaskSpec"]
    listed_task |= {"required": ["name"], "anyOf": [{"required": ["template"]}, {"required": ["segments"]}]}
    named = {key: value for key, value in listed_task.items() if key != "required"}
    named["properties"] = {key: value for key, value in named["properties"].items() if key != "name"}
    found["$defs"]["NamedTask"] = named
    listed = {key: tasks.pop(key) for key in ("type", "items", "default") if key in tasks}
    by_name = {"type": "object", "additionalProperties": {"$ref": "#/$defs/NamedTask"}}
    tasks["anyOf"] = [by_name, listed]
    return found


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``key.sub`` and value; tasks and other lists of mappings count by their names or numbers."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}{key}.")
    elif isinstance(values, list | tuple) and values and all(isinstance(v, Mapping) and "name" in v for v in values):
        for value in values:
            rest = {key: each for key, each in value.items() if key != "name"}
            yield from _leaves(rest, f"{prefix}{value['name']}.")
    else:
        yield prefix.rstrip("."), values


def _covers(written: str, key: str) -> bool:
    return key == written or key.startswith(f"{written}.")
