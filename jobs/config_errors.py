"""What a configuration breaks, in words: keys by their names, unknown ones with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.errors import did_you_mean

_TRUTH_WORDS = "no, yes, on, off, true and false"


def explain(error: ValidationError, values: Any, model: type[BaseModel]) -> str:
    """Return one line a problem: where, the rule, the value and the remedy.

    Args:
        error: what validation found.
        values: what was validated.
        model: what it was validated as.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return "\n".join(dict.fromkeys(line for problem in problems for line in _lines(problem, values, model)))


def _lines(problem: Any, values: Any, model: type[BaseModel]) -> Iterator[str]:
    path, kind, got = _path(problem["loc"], values), problem["type"], problem["input"]
    where = ".".join(_names(path, values))
    if kind == "extra_forbidden":
        known = {key for found in _models(model, path[:-1], values) for key in found.model_fields}
        yield f"a key must be known, got {where!r}{did_you_mean(str(path[-1]), known)}"
    elif kind in ("union_tag_not_found", "union_tag_invalid") and isinstance(got, dict):
        members = list(_models(model, path, values))
        known = {key for member in members for key in member.model_fields}
        for key in got.keys() - known:
            yield f"a key must be known, got '{where}.{key}'{did_you_mean(str(key), known)}"
        key = str(problem["ctx"]["discriminator"]).strip("'")
        kinds = [str(kind) for member in members for kind in get_args(member.model_fields[key].annotation)]
        yield f"{where}.{key} must be one of {kinds}, got {got.get(key)!r}; name one"
    elif kind == "missing":
        yield f"{where} must be given, got nothing; add it to the configuration"
    elif kind == "value_error":
        yield str(problem["msg"]).removeprefix("Value error, ")
    elif kind == "string_type" and isinstance(got, bool):
        yield (
            f"{where} must be text, got the truth value {got}: YAML reads {_TRUTH_WORDS} as truth values; quote them, "
            "for example label_words: [' no', ' yes']"
        )
    elif kind == "string_type" and isinstance(got, int | float):
        yield f"{where} must be text, got the number {got}; quote it: ' {got}'"
    else:
        yield f"{where}: {problem['msg']}, got {got!r}; change it"


def _path(location: Sequence[int | str], values: Any) -> list[int | str]:
    """Return where in the values a problem lies: pydantic names the kinds of unions in between, which are left out."""
    path: list[int | str] = []
    is_entered = False  # a mapping that names its kind has the kind's name next, which a key of it may have as well
    for place, part in enumerate(location):
        if is_entered and isinstance(values, dict) and values.get("kind") == part:
            is_entered = False
            continue
        if isinstance(values, dict) and isinstance(values.get("tasks"), dict) and part == "tasks":
            values = {**values, "tasks": list(values["tasks"].values())}
        inside = part in values if isinstance(values, dict) else isinstance(values, list | tuple) and part in range(
            len(values)
        )  # fmt: skip
        if inside:
            path.append(part)
            values, is_entered = values[part], True
        elif place == len(location) - 1 and isinstance(values, dict | list | tuple):
            path.append(part)  # what is missing
    return path or list(location)


def _names(path: Sequence[int | str], values: Any) -> Iterator[str]:
    """Yield a path's parts, a task by its name instead of its number."""
    tasks = values.get("tasks") if isinstance(values, dict) else None
    for place, part in enumerate(path):
        if place == 1 and path[0] == "tasks" and isinstance(part, int):
            if isinstance(tasks, dict):
                part = list(tasks)[part]
            elif isinstance(tasks, list) and isinstance(tasks[part], dict):
                part = tasks[part].get("name", part)
        yield str(part)


def _models(annotation: Any, path: Sequence[int | str], values: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a path may end in: through optional values, unions told apart by a key, and containers."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models(get_args(annotation)[0], path, values)
    elif origin in (Union, UnionType):
        members = [member for member in get_args(annotation) if _may_be(member, values)]
        for member in members or get_args(annotation):
            yield from _models(member, path, values)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            yield annotation
        elif path[0] in annotation.model_fields:
            found = annotation.model_fields[str(path[0])].annotation
            yield from _models(found, path[1:], _at(values, path[0]))
    elif path and origin is not None:
        yield from _models(get_args(annotation)[-1 if origin is dict else 0], path[1:], _at(values, path[0]))


def _may_be(member: Any, values: Any) -> bool:
    """Whether a member of a union has the ``kind`` that the values name."""
    field = getattr(member, "model_fields", {}).get("kind")
    return field is not None and isinstance(values, dict) and values.get("kind") in get_args(field.annotation)


def _at(values: Any, part: int | str) -> Any:
    if isinstance(values, dict) and isinstance(part, int):
        values = list(values.values())
    try:
        return values[part]
    except (KeyError, IndexError, TypeError):
        return None
