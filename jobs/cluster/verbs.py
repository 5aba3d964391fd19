"""The verbs of jobs on a cluster: submit, status, logs, stop, list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.arguments import Json, finish
from pipeline.errors import InputError, did_you_mean

verbs = typer.Typer()
Address = Annotated[
    str, typer.Option("--address", envvar="RAY_ADDRESS", help="Dashboard of the cluster, http://head:8265.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that submit or list shows.")]


@verbs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Address,
    verb: Annotated[str, typer.Argument(metavar="VERB", help="Verb to run there, with its own options after it.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the end.")] = True,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="Name of a secret that the cluster's environment holds; its value never travels."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a verb as a job of a cluster: code and configuration travel along.

    The same work has the same id: a second submit attaches to the first one's job.
    """
    from jobs.config import load_config

    config, overrides, extra = _verb_arguments(context.find_root().command, verb, context.args)
    loaded = load_config(config, overrides)  # what is wrong with it is said before Ray is imported
    from jobs.cluster.submission import submit as submit_job

    code, found = submit_job(verb, loaded, extra, address, secret or (), wait)
    if as_json:
        print(json.dumps(found, indent=2, default=str), flush=True)  # noqa: T201
    raise typer.Exit(code)


def _verb_arguments(root: Any, verb: str, arguments: list[str]) -> tuple[Path, list[str], list[str]]:
    """Split a verb's arguments into configuration, overrides and its other options."""
    with_config = {
        name: command
        for name, command in root.commands.items()
        if "config" in {p.name for p in command.params} and name != "schedule"
    }
    command = with_config.get(verb)
    if command is None:
        raise InputError(
            f"submit must be given a verb that has a configuration, got {verb!r}{did_you_mean(verb, with_config)}"
        )
    parsed = command.make_context(verb, list(arguments), resilient_parsing=False).params
    given = parsed["config"]
    overrides = list(parsed.get("overrides") or ())
    extra = [argument for argument in arguments if argument not in overrides]
    for place in (place for place, argument in enumerate(extra) if argument in ("--config", "-c")):
        extra[place : place + 2] = []
        break
    return Path(given), overrides, [argument for argument in extra if not argument.startswith("--config=")]


@verbs.command()
def status(job: JobId, address: Address, as_json: Json = False) -> None:
    """Say how a submitted job is."""
    from jobs import tables
    from jobs.cluster.ray_jobs import Jobs

    found = Jobs(address).status(job)
    tables.show_jobs([found])
    finish(found, as_json)


@verbs.command()
def logs(
    job: JobId, address: Address, follow: Annotated[bool, typer.Option("--follow", help="Until the end.")] = False
) -> None:
    """Show a submitted job's log."""
    from jobs.cluster.submission import show_log

    raise typer.Exit(show_log(job, address, follow))


@verbs.command()
def stop(job: JobId, address: Address) -> None:
    """Stop a submitted job; training saves a checkpoint first."""
    from jobs.cluster.ray_jobs import Jobs
    from pipeline.progress import say

    say(f"{job} {'is stopping' if Jobs(address).stop(job) else 'does not run'}")


@verbs.command(name="list")
def list_jobs(address: Address, as_json: Json = False) -> None:
    """List the jobs of a cluster."""
    from jobs import tables
    from jobs.cluster.ray_jobs import Jobs

    found = Jobs(address).all()
    tables.show_jobs(found)
    finish(found, as_json)
