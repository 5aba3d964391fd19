"""The verbs that explain a configuration: config show, config schema."""

from __future__ import annotations

import json

import typer

from jobs.arguments import ConfigFile, Json, Overrides

verbs = typer.Typer(help="The configuration: resolved and explained, or as a schema for editors.")


@verbs.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved configuration, each value with where it came from."""
    from jobs.config_views import as_yaml, explained

    rows = explained(config, overrides or ())
    print(json.dumps(rows, indent=2) if as_json else as_yaml(rows), end="" if not as_json else "\n")  # noqa: T201


@verbs.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, by which an editor completes and checks the YAML."""
    from jobs.config_views import schema

    print(json.dumps(schema(), indent=2))  # noqa: T201
