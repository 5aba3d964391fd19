"""The verbs that explain a configuration: config show, config schema."""

from __future__ import annotations

import json

import typer

from jobs.arguments import ConfigFile, Json, Overrides

verbs = typer.Typer(help="The configuration: resolved and explained, or as a schema for editors.")


@verbs.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved configuration, each value with where it came from."""
    from jobs.config_views import as_yaml, explained, sizes

    rows = explained(config, overrides or ())
    found = sizes(config, overrides or ())
    if as_json:
        solved = {} if found is None else {"adapter.r": {"value": found.trained.r, "from": "size"}}
        print(json.dumps(rows | solved, indent=2))  # noqa: T201
    else:
        print(as_yaml(rows), end="")  # noqa: T201
    if found is not None:
        from jobs.tables import show_sizes

        show_sizes(found)


@verbs.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, by which an editor completes and checks the YAML."""
    from jobs.config_views import schema

    print(json.dumps(schema(), indent=2))  # noqa: T201
