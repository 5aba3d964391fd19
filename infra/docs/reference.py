"""Reference pages in Markdown, from what the code says of itself: keys, commands, names."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import typer

import mtl_lora
from jobs import cli
from jobs.config_views import schema
from jobs.study_config import StudyConfig

RULES = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "characters ≥ {}",
    "maxLength": "characters ≤ {}",
    "minItems": "items ≥ {}",
    "maxItems": "items ≤ {}",
    "minProperties": "entries ≥ {}",
    "pattern": "matches `{}`",
}
"""Keywords of a JSON Schema that limit a value, as a person reads them."""
SHAPE = {"type", "format", "enum", "const", "items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "$ref"}
ASIDE = {"title", "description", "default", "discriminator"}
REQUIRED, NONE = object(), object()
"""Instead of a default: the key must be given; a file that leaves it out has nothing there."""
Schema = Mapping[str, Any]


def configuration() -> str:
    """Return the page of every key of a run's configuration."""
    return (
        "# Configuration\n\n"
        "Every key of a run's YAML file and of `key.sub=value` on the command line, from the classes that check them. "
        "TASK, KEY and the like stand for a name of yours. `mtl-lora config show --config FILE` prints a resolved "
        "configuration and where each value came from, `mtl-lora config schema` all this for an editor.\n\n"
        + _Keys(schema()).page()
    )


def study() -> str:
    """Return the page of every key of a study's configuration."""
    found = StudyConfig.model_json_schema(by_alias=True)
    return f"# Configuration of a study\n\nWhat `mtl-lora study --config` takes.\n\n{_Keys(found).page()}"


class _Keys:
    """The keys under a JSON Schema's root, a section for each object."""

    def __init__(self, root: Schema) -> None:
        self.root, self.definitions, self.anchors = root, root["$defs"], set[str]()

    def page(self) -> str:
        return "\n".join(self._sections("", self.root, {}, ""))

    def _sections(self, path: str, found: Schema, defaults: Any, kind: str) -> Iterator[str]:
        title = (f"`{path}`" if path else "Top level") + (f", {kind}" if kind else "")
        anchor = f"{path}-{kind}".strip("-").replace("`", "").replace(": ", "-") or "top"
        depth = len([step for step in path.split(".") if not step.isupper()])
        yield f"{'##' if depth == 1 else '###'} {title} {{#section-{anchor}}}\n"
        yield f"{_text(found.get('description', ''))}\n"
        yield "| key | type | default | rule | description |\n|---|---|---|---|---|"
        below = []
        for key, value in found["properties"].items():
            name, default = f"{path}.{key}".lstrip("."), self._default(key, value, found, defaults)
            objects = list(self._objects(name, value))
            below += [(inner, each, default, of) for inner, each, of in objects]
            cells = [self._key(name), self._type(value, name), _code(default), self._rules(value)]
            if objects and isinstance(default, dict):
                cells[2] = "below"
            yield f"| {' | '.join(cells)} | {_text(value.get('description', ''))} |"
        yield ""
        for inner, each, default, of in below:
            yield from self._sections(inner, each, default, of)

    def _key(self, name: str) -> str:
        if name in self.anchors:  # the key of another kind
            return f"`{name}`"
        self.anchors.add(name)
        return f'<code id="{name}">{name}</code>'

    def _default(self, key: str, value: Schema, parent: Schema, defaults: Any) -> Any:
        if isinstance(defaults, Mapping) and key in defaults:
            return defaults[key]
        if key in parent.get("required", ()):
            return REQUIRED
        # What a factory makes stands in no schema: an empty mapping or list.
        empty = {"object": {}, "array": []}
        told = [each for each in (value, *self._branches(value)) if "default" in each or each.get("type") in empty]
        return told[0].get("default", empty.get(told[0].get("type"))) if told else NONE

    def _branches(self, value: Schema) -> Iterator[Schema]:
        """Yield what a value may be, references followed, each one once."""
        if "$ref" in value:
            yield self.definitions[value["$ref"].rpartition("/")[2]]
        elif "properties" not in value and ("anyOf" in value or "oneOf" in value):
            for each in (*value.get("anyOf", ()), *value.get("oneOf", ())):
                yield from self._branches(each)
        else:
            yield value

    def _objects(self, path: str, value: Schema) -> Iterator[tuple[str, Schema, str]]:
        """Yield each object with keys of its own that a value is or holds: path, schema, what tells it from others."""
        branches = list(self._branches(value))
        own = [each for each in branches if "properties" in each]
        for each in own:
            kind = each["properties"].get("kind", {}).get("const")
            yield path, each, (f"`kind: {kind}`" if kind else each["title"]) if len(own) > 1 else ""
        if any(isinstance(each.get("additionalProperties"), Mapping) for each in branches):
            # A list of objects with a name is the other form of a mapping: its keys are the same.
            branches = [each for each in branches if "items" not in each]
        for each in branches:
            if "properties" not in each:
                inner = each.get("additionalProperties"), each.get("items")
                for held, step in zip(inner, ("TASK" if path == "tasks" else "KEY", "N"), strict=True):
                    if isinstance(held, Mapping):
                        yield from self._objects(f"{path}.{step}", held)

    def _type(self, value: Schema, path: str) -> str:
        return " or ".join(dict.fromkeys(self._type_of(each) for each in self._branches(value)))

    def _type_of(self, value: Schema) -> str:
        unknown = value.keys() - RULES.keys() - SHAPE - ASIDE - {"properties", "required"}
        if unknown:
            raise ValueError(f"each keyword of the schema must have its words here, got {unknown}; add them to RULES")
        if "properties" in value:
            return "object"
        if "enum" in value or "const" in value:
            return ", ".join(_code(each) for each in value.get("enum", [value.get("const")]))
        if "prefixItems" in value:
            return f"list: {', '.join(self._type(each, '') for each in value['prefixItems'])}"
        if value.get("type") == "array":
            return f"list of {self._type(value['items'], '')}" if value.get("items") else "list"
        if value.get("type") == "object":
            held = value.get("additionalProperties")
            return f"mapping to {self._type(held, '')}" if isinstance(held, Mapping) else "mapping"
        named = {"boolean": "true or false", "string": value.get("format", "text"), None: "any value"}
        return named.get(value.get("type"), str(value.get("type")))

    def _rules(self, value: Schema) -> str:
        found = {}
        for each in self._branches(value):
            if "properties" not in each:
                found |= {RULES[key].format(each[key]): None for key in RULES if key in each}
                for held in (each.get("items"), each.get("additionalProperties")):
                    if isinstance(held, Mapping) and self._rules(held):
                        found[f"each {self._rules(held)}"] = None
        return ", ".join(found)


def commands() -> str:
    """Return the page of the command's verbs, each with its arguments and options."""
    root: Any = typer.main.get_command(cli.app)
    lines = ["# Commands\n"]
    for words, command in _commands("mtl-lora", root):
        context = command.context_class(command, info_name=words)
        lines += [f"## `{words}` {{#{words.replace(' ', '-')}}}\n"] if words != "mtl-lora" else []
        lines += [f"{_prose(command.help or '')}\n", f"```text\n{context.get_usage()}\n```\n"]
        records = [each.get_help_record(context) for each in command.params]
        rows = [f"| `{names}` | {_text(words)} |" for names, words in filter(None, records)]
        lines += ["| argument or option | |\n|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield words, command
    for name, each in sorted(getattr(command, "commands", {}).items()):
        if not each.hidden:
            yield from _commands(f"{words} {name}", each)


def python_names() -> str:
    """Return the page of the library's public names: those of the package, then those of each module."""
    lines, seen = ["# Python names of mtl_lora\n", f"{_prose(mtl_lora.__doc__ or '')}\n"], set[tuple[str, int]]()
    modules = [each.name for each in pkgutil.walk_packages(mtl_lora.__path__, "mtl_lora.")]
    for module in map(importlib.import_module, ["mtl_lora", *modules]):
        values = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
        values = {name: value for name, value in values.items() if (name, id(value)) not in seen}
        if module is not mtl_lora and values:
            lines += [f"## {module.__name__} {{#{module.__name__}}}\n", f"{_prose(module.__doc__ or '')}\n"]
        for name, value in values.items():
            seen.add((name, id(value)))
            lines += [f"### `{name}` {{#{module.__name__}.{name.strip('_')}}}\n", *_described(module, name, value)]
    return "\n".join(lines)


def _described(module: Any, name: str, value: Any) -> Iterator[str]:
    if not callable(value):
        yield f"{_prose(_words_below(module, name))}\n"
        return
    yield f"```python\n{name}{_signature(value)}\n```\n"
    yield f"{_prose(inspect.getdoc(value) or '')}\n"
    if not inspect.isclass(value):
        return
    public = [getattr(mtl_lora, each) for each in mtl_lora.__all__]
    for owner in value.__mro__:
        if not owner.__module__.startswith("mtl_lora") or (owner is not value and owner in public):
            continue
        for method, kept in vars(owner).items():
            plain = kept.fget if isinstance(kept, property) else getattr(kept, "__func__", kept)
            if method.startswith("_") or not inspect.isfunction(plain) or vars(value).get(method, kept) is not kept:
                continue
            shown = "" if isinstance(kept, property) else _signature(kept.__get__(object(), value))
            yield f"**`{name}.{method}{shown}`**\n\n{_prose(inspect.getdoc(plain) or '')}\n"


def _signature(value: Any) -> str:
    try:
        return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", str(inspect.signature(value)))
    except ValueError:  # an error's, which takes what any error takes
        return "(*args)"


def _words_below(module: Any, name: str) -> str:
    """Return the text that stands under a constant, in the module that makes it."""
    for source in (module, importlib.import_module(getattr(module, "_MODULES", {}).get(name, module.__name__))):
        body = ast.parse(inspect.getsource(source)).body
        for node, after in pairwise(body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            is_named = any(isinstance(each, ast.Name) and each.id == name for each in targets)
            if is_named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return inspect.cleandoc(str(after.value.value))
    return ""


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown: its sections as lists, its roles as code."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(docstring).splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes):", line)
        item = re.fullmatch(r" {4}(\**[\w.]+(?:, \w+)*): (.*)", line) if section else None
        if heading:
            section = True
            lines += [f"**{heading[1]}**", ""]
        elif item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("    "):
            lines.append(line)
        elif set(line) == {"-"}:
            lines[-1] = f"**{lines[-1]}**\n"
        else:
            section = False
            if line.startswith(("* ", "- ")) and lines and lines[-1] and not lines[-1].startswith((*"*- ",)):
                lines.append("")
            lines.append(line)
    return _roles("\n".join(lines))


def _text(words: str) -> str:
    """Return a description as one cell of a table."""
    return _roles(" ".join(words.split())).replace("|", "\\|")


def _roles(words: str) -> str:
    words = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", words)
    parts = re.split(r"(``.+?``|`[^`]+`)", words)
    parts[::2] = [re.sub(r"<(?=[A-Za-z/!])", "&lt;", part) for part in parts[::2]]
    return "".join(parts)


def _code(value: Any) -> str:
    if value is REQUIRED or value is NONE:
        return "required" if value is REQUIRED else ""
    return f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"
