"""The ``mtl-lora`` command: thin verbs over the stages.

Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 held back by a gate.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import RESULT_MARK
from pipeline.errors import HeldBack, InputError

if TYPE_CHECKING:
    from jobs.config import RunConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    name="mtl-lora",
    help="Train one language model on many industrial tasks, evaluate it and put it in front of traffic.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Config = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file, or the name of a packaged one (demo, ads_real).")
]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file, or the name of a packaged one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Values over the file's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, last on standard output.")]


def _run(config: Path, overrides: list[str] | None, as_json: bool, verb: Callable[[RunConfig], Any]) -> None:
    from jobs.config import load_config

    _finish(verb(load_config(config, overrides or ())), as_json)


def _finish(result: Any, as_json: bool) -> None:
    if os.environ.get("MTL_LORA_SUBMITTED"):
        print(RESULT_MARK + json.dumps(result, default=str), flush=True)  # noqa: T201
    elif as_json:
        print(json.dumps(result, indent=2, default=str), flush=True)  # noqa: T201


def _as_job(
    verb: str, config: Path, overrides: list[str] | None, as_json: bool, run: Callable[[RunConfig], Any]
) -> None:
    """Run a verb inside this Ray job, or, outside of one, submit it as one and wait."""
    from jobs.config import load_config
    from jobs.submission import run_as_job
    from pipeline.orchestration import inside_job

    if inside_job():
        return _run(config, overrides, as_json, run)
    code, result = run_as_job(verb, load_config(config, overrides or ()))
    if result is not None:
        _finish(result, as_json)
    raise typer.Exit(code)


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    append: Annotated[bool, typer.Option("--append", help="Add the input to the shards that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Validate the records and write them as WebDataset shards with a manifest."""
    from jobs import stages

    _run(config, overrides, as_json, lambda c: stages.prepare(c, append).model_dump(mode="json", by_alias=True))


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what training will do: steps, samples a task, shards."""
    from jobs import stages, tables

    def verb(run: RunConfig) -> dict[str, Any]:
        numbers = stages.plan(run)
        tables.show_plan(numbers)
        return numbers

    _run(config, overrides, as_json, verb)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the adapter, as a Ray job (on a local cluster where no address is given)."""
    from jobs import stages

    _as_job("train", config, overrides, as_json, lambda c: {"adapter": str(stages.train(c))})


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Score the trained adapter and the untrained base on the test shards."""
    from jobs import stages, tables

    def verb(run: RunConfig) -> dict[str, Any]:
        trained, base = stages.evaluate(run)
        tables.show_evaluation(trained, base)
        return trained.model_dump(mode="json", by_alias=True)

    _as_job("evaluate", config, overrides, as_json, verb)


@app.command()
def export(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write each task as a plain PEFT LoRA folder, compared with the model first."""
    from jobs import stages

    _run(config, overrides, as_json, lambda c: {"folders": [str(f) for f in stages.export(c)]})


@app.command()
def promote(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Register the adapter as challenger; make it champion if the gates let it pass."""
    from jobs import release, tables

    def verb(run: RunConfig) -> dict[str, Any]:
        decision = release.promote(run)
        tables.show_decision(decision)
        return decision.model_dump(mode="json", by_alias=True)

    _run(config, overrides, as_json, verb)


@app.command()
def compare(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Compare the run with the champion (the untrained base where there is none) on the same samples, in pairs."""
    from jobs import release, tables

    def verb(run: RunConfig) -> dict[str, Any]:
        found = release.compare(run)
        tables.show_comparison(found)
        return found.model_dump(mode="json", by_alias=True)

    _run(config, overrides, as_json, verb)


@app.command()
def rollback(
    config: ConfigFile,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="Version to make champion; the one before this by default.")] = None,
    why: Annotated[str, typer.Option(help="Reason, for the ledger.")] = "asked for",
    as_json: Json = False,
) -> None:
    """Make the champion before this one champion again."""
    from jobs import release

    _run(config, overrides, as_json, lambda c: release.rollback(c, to, why))


@app.command()
def lineage(
    config: ConfigFile,
    of: Annotated[str, typer.Option(help="Version number, alias, or a day such as 2026-05-03.")] = "champion",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say which data, code and parent made a version, or the champion of a day."""
    from jobs import release

    _run(config, overrides, as_json, lambda c: release.lineage_of(c, of))


@app.command()
def report(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the run's report, one HTML page."""
    from jobs import release

    _run(config, overrides, as_json, lambda c: {"report": str(release.report(c))})


@app.command()
def retrain(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Run every stage, raw records to registry, as one Ray job."""
    from jobs.retrain import retrain as run_all

    _as_job("retrain", config, overrides, as_json, run_all)


@app.command()
def demo(config: ConfigFile = Path("demo"), overrides: Overrides = None, as_json: Json = False) -> None:
    """Run every stage on synthetic Ads data, into runs/demo."""
    from jobs.retrain import retrain as run_all

    _as_job("demo", config, overrides, as_json, run_all)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of this checkout: tables with goals and ratios."""
    import runpy

    if not Path("tests/benchmarks/__main__.py").is_file():
        raise InputError("bench must run in the repository's root, found no tests/benchmarks here; change the folder")
    sys.argv = ["tests.benchmarks", *context.args]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module("tests.benchmarks", run_name="__main__")


def main() -> None:
    """Run the command and turn errors into exit codes."""
    # A polite kill must run the clean-up that stops the job and the local cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except HeldBack as error:
        print(f"held back: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(3)


if __name__ == "__main__":
    main()
