"""A configuration's file, those that it extends, and its overrides become plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from pipeline.errors import InputError

PACKAGED = Path(__file__).parent / "configs"
EXTENDS = "extends"
"""Key of a file that names one or more others, packaged or by their path from it: each one's values stand over those of
the one before it, and the file's own over all."""


BY_BASE = "by_base"
"""Key of a file that holds, by the value of ``model.base``, what stands over the rest of the file for that base:
another base model often wants another rate. Overrides stand over both."""


_CONFUSED = (TypeError, ValueError, KeyError, AttributeError, AssertionError, RecursionError, OverflowError)
"""How OmegaConf and YAML's constructors end on values that nobody writes: nesting without end, dates that are none."""


def read_resolved(path: Path, overrides: Sequence[str], kind: str = "") -> Any:
    """Return the values of a configuration's file, or of a packaged one, overridden and with interpolations resolved.

    Args:
        path: of the file, or the name of a packaged one.
        overrides: ``key.sub=value``.
        kind: folder of the packaged ones that a name may stand for, beside the ordinary ones.

    Raises:
        InputError: the file is missing or no YAML, an override cannot be applied, or an interpolation has no value.
    """
    raw = _for_base(_read_whole(_find(path, kind)), overrides)
    for override in overrides:
        _override(raw, override)
    return _interpolated(raw)


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of a configuration's file, or of a packaged one, as they are written.

    Args:
        path: of the file, or the name of a packaged one.
        overrides: of which the base model's counts, whose own settings the file may hold.

    Raises:
        InputError: the file is missing or no YAML.
    """
    values = OmegaConf.to_container(_for_base(_read_whole(_find(path)), overrides), resolve=False)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _read_whole(path: Path, extending: tuple[Path, ...] = ()) -> DictConfig:
    """Return a file's values over those of the files that it extends."""
    if path.resolve() in extending:
        chain = " → ".join(each.name for each in (*extending, path))
        raise InputError(f"a file must not extend itself, got {chain}; take one {EXTENDS} out")
    raw = _read_yaml(path)
    if EXTENDS not in raw:
        return raw
    named = OmegaConf.to_container(raw, resolve=False)[EXTENDS]  # type: ignore[index, call-overload]
    names = [named] if isinstance(named, str) else named
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        raise InputError(
            f"{EXTENDS} must name a configuration or a list of them, got {named!r} in {path}; write {EXTENDS}: ads"
        )
    beside = [path.parent / name for name in names]
    files = [place if place.is_file() else _find(Path(name)) for place, name in zip(beside, names, strict=True)]
    below = [_read_whole(file, (*extending, path.resolve())) for file in files]
    try:
        whole = OmegaConf.merge(*below, raw)
    except (OmegaConfBaseException, *_CONFUSED) as error:
        raise InputError(
            f"a key must hold the same kind of value (a mapping, a list) in {path} as in {names}: {error}; write it as "
            "there"
        ) from error
    if not isinstance(whole, DictConfig):
        raise InputError(f"{path} must hold a mapping of keys, as {names} do; see jobs/configs")
    del whole[EXTENDS]
    return whole


def _for_base(raw: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a file's values with those that it holds for its base model over the rest, or for the one that an override
    names."""
    if BY_BASE not in raw:
        return raw
    every = OmegaConf.to_container(raw, resolve=False)[BY_BASE]  # type: ignore[index, call-overload]
    if not (isinstance(every, dict) and all(isinstance(values, dict) for values in every.values())):
        raise InputError(
            f"{BY_BASE} must hold settings by base model, got {every!r}; write {BY_BASE}: {{minilm-l6: {{training: "
            "{learning_rate: 0.003}}}"
        )
    named = raw.copy()
    for override in overrides:
        if override.startswith(("model.base=", "model=")):
            _override(named, override)
    del raw[BY_BASE]
    try:
        whole = OmegaConf.merge(raw, every.get(OmegaConf.select(named, "model.base"), {}))
    except (OmegaConfBaseException, *_CONFUSED) as error:
        raise InputError(
            f"{BY_BASE} must hold the same kind of value (a mapping, a list) a key as the rest of the file, it does "
            f"not: {error}; write model: {{base: …}} and the settings as they stand there"
        ) from error
    return whole if isinstance(whole, DictConfig) else raw


def _find(path: Path, kind: str = "") -> Path:
    if path.is_file():
        return path
    folder = PACKAGED / kind
    packaged = folder / path.with_suffix(".yaml").name
    if packaged.is_file() and path.parent in (Path(), Path(kind), Path("jobs/configs") / kind):
        return packaged
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise InputError(f"--config must name a YAML file, found none at {path}; give a path, or one of: {known}")


def _read_yaml(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except GrammarParseError as error:
        reason = str(error).replace("\n", " ")
        raise InputError(
            f"between ${{ and }} must stand a plain name or an interpolation in {path}: {reason}; fix it"
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, *_CONFUSED) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"{path} must be YAML in which no key (no task) comes twice: {reason}; fix it") from error
    if not isinstance(raw, DictConfig):
        raise InputError(f"{path} must hold a mapping of keys, got a {type(raw).__name__}; see jobs/configs")
    return raw


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return plain values with ``key.sub=value`` overrides over them.

    Raises:
        InputError: one is none, or cannot be applied.
    """
    raw = OmegaConf.create(values)
    for override in overrides:
        _override(raw, override)
    found = OmegaConf.to_container(raw, resolve=True)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _override(raw: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"an override must read key.sub=value, got {override!r}; for example training.max_steps=50")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])  # as in a file, dates stay text
        plain = OmegaConf.to_container(parsed, resolve=False)
        OmegaConf.update(raw, key, plain["value"] if isinstance(plain, dict) else None, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, *_CONFUSED) as error:
        raise InputError(f"override {override!r} cannot be applied: {error}; write key.sub=value") from error


def _interpolated(raw: DictConfig) -> Any:
    """Return the plain values, with interpolations such as ``${oc.env:HOME}`` resolved everywhere but in templates:
    there ``${field}`` is a price.

    Raises:
        InputError: one cannot be resolved, or something else than a template would still hold ``${``.
    """
    values = OmegaConf.to_container(raw, resolve=False)
    templates = {place: task.pop("template") for place, task in _tasks_in(values) if "template" in task}
    try:
        values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, *_CONFUSED) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"an interpolation must have a value, got {reason}; set it, or write the value") from error
    if "${" in json.dumps(values, default=str):
        raise InputError("only a template may hold ${ as it stands, another value does; write it without")
    for place, task in _tasks_in(values):
        if place in templates:
            task["template"] = templates[place]
    return values


def _tasks_in(values: Any) -> list[tuple[Any, dict[Any, Any]]]:
    """Return each task's name or number and its mapping."""
    tasks = values.get("tasks")
    places = tasks.items() if isinstance(tasks, dict) else enumerate(tasks if isinstance(tasks, list) else [])
    return [(place, task) for place, task in places if isinstance(task, dict)]
