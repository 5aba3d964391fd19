"""The tasks' record schemas and the artefacts' contracts, as JSON Schema for those who bring the data."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.contracts import EvaluationReport, PromotionDecision, Sample, ShardManifest, TaskSpec
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.shards import replace_file
from pipeline.labels import number_of
from pipeline.record import column_of

SCHEMAS = "schemas"
"""Folder beside the manifest."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def record_schema(task: TaskSpec) -> dict[str, Any]:
    """Return the JSON Schema of one task's records; further fields are allowed."""
    properties: dict[str, Any] = {
        name: {"type": ["string", "number", "boolean"], "description": "Text that the prompt names."}
        for name in task.text_fields
    }
    required = [*task.text_fields, task.label_field]
    if task.kind == "choice":
        choice = {"type": "string", "pattern": r"\S"}
        listed = {"type": "array", "minItems": 2, "items": choice}
        as_text = {"type": "string", "contentMediaType": "application/json"}
        properties[task.choices_field] = {"anyOf": [listed, as_text], "description": "The answers to choose from."}
        required.append(task.choices_field)
    if task.image_field:
        properties[task.image_field] = {
            "type": "string",
            "description": "PNG or JPEG in images.zip, or a path beside the record file.",
        }
        required.append(task.image_field)
    if task.weight_field:
        properties[task.weight_field] = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}
        required.append(task.weight_field)
    properties[task.label_field] = _label_schema(task)
    for field, path in task.columns.items():
        if field in required:
            required[required.index(field)] = column_of(path, ())
    properties = _by_column(properties, task)
    return {
        "$schema": DIALECT,
        "title": f"record of task {task.name}",
        "description": f"Prompt: {task.template!r}",
        "type": "object",
        "properties": properties,
        "required": list(dict.fromkeys(required)),
    }


def _by_column(properties: dict[str, Any], task: TaskSpec) -> dict[str, Any]:
    """Return the properties under the columns that they are read from; of what lies within one, only that it does."""
    found: dict[str, Any] = {}
    for field, schema in properties.items():
        path = task.columns.get(field, field)
        column = path if field not in task.columns else column_of(path, ())
        found[column] = schema if path == column else {"description": f"Holds {path!r}."}
    return found


def _label_schema(task: TaskSpec) -> dict[str, Any]:
    if task.kind == "multilabel":
        one = _label_schema(task.model_copy(update={"kind": "multiclass"}))
        as_text = {"type": "string", "contentMediaType": "application/json"}
        return {"anyOf": [{"type": "array", "items": one}, as_text], "description": "All classes that the record has."}
    if task.kind == "generation":
        texts: list[dict[str, Any]] = [{"type": "string", "pattern": r"\S"}, {"type": ["number", "boolean"]}]
        answers = {"type": "array", "minItems": 1, "items": {"anyOf": texts}}
        return {"anyOf": [*texts, answers], "description": "The answer, or a list of right ones, best first."}
    if task.label_map:
        return {
            "type": ["string", "number", "boolean"],
            "description": f"One of {list(task.label_map)}, as text or as the same number.",
        }
    numbers = [value for word in task.class_names if (value := number_of(word.strip())) is not None]
    words: list[dict[str, Any]] = [{"enum": numbers}] if numbers else []
    if task.kind == "regression":
        return {"anyOf": [{"type": "number"}, {"type": "string"}], "description": "A number, also as text."}
    if task.kind == "ordinal":
        bounds = {"minimum": min(task.label_values), "maximum": max(task.label_values)}
        return {
            "anyOf": [{"type": "number", **bounds}, {"type": "string"}, *words],
            "description": "A number, also as text, or a label word.",
        }
    number: dict[str, Any] = {"type": "integer", "minimum": 0}
    if task.num_classes:
        number["maximum"] = task.num_classes - 1
    listed = [word.strip() for word in task.class_names]
    return {
        "anyOf": [number, {"type": "boolean"}, {"type": "string", "pattern": r"\S"}, *words],
        "description": f"Index of the class, also as text, or {f'one of {listed}' if listed else 'the answer itself'}.",
    }


@functools.cache
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return {"$schema": DIALECT, **model.model_json_schema(by_alias=True)}


def write_schemas(tasks: Sequence[TaskSpec], folder: Path) -> list[Path]:
    """Write the schema of each task's records, of the configuration and of the artefacts; return the files.

    Schemas of tasks that are no more go.
    """
    schemas = {f"record-{task.name}": record_schema(task) for task in tasks}
    for model in (DataConfig, Sample, ShardManifest, EvaluationReport, PromotionDecision):
        schemas[model.__name__] = _schema_of(model)
    for old in set(Path(folder).glob("record-*.schema.json")) - {Path(folder) / f"{n}.schema.json" for n in schemas}:
        old.unlink()
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, schema in schemas.items():
        paths.append(Path(folder) / f"{name}.schema.json")
        replace_file(paths[-1], (json.dumps(schema, indent=2) + "\n").encode())
    return paths
