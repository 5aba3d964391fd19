"""What the verbs have in common: their arguments, and how a result leaves the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file, or the name of a packaged one (demo, ads, glue …).")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Values over the file's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, last on standard output.")]


def finish(result: Any, as_json: bool) -> None:
    """Hand a result over: to the one who follows this job, or as one JSON document, last on standard output."""
    from pipeline.progress import Result, is_followed, send

    if is_followed():
        send(Result(result))
    elif as_json:
        print(json.dumps(result, indent=2, default=str), flush=True)  # noqa: T201
