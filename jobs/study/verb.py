"""The verb ``study`` of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.arguments import Json, Overrides, finish

verbs = typer.Typer()


@verbs.command()
def study(
    config: Annotated[
        Path, typer.Option(help="A study's YAML file, or the name of a packaged one: smoke, standard, …")
    ] = Path("standard"),
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is left and how long it takes, and stop.")
    ] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Write table and page of the runs that are over, and stop.")
    ] = False,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures", help="Train each searched arm of the first suite once more, for features and latency."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods at equal size: suites × arms × searched learning rates × seeds; table, figures and page.

    After a kill the same command goes on with what is left. One suite: `suites=[offers]`.
    """
    from jobs.study.trials import load_study

    loaded = load_study(config, overrides or [])  # what is wrong with it is said before anything heavy is imported
    from jobs.study.study import study as run_study

    finish(run_study(loaded, dry_run, results, figures), as_json)
