"""The ``mtl-lora`` command: thin verbs over the stages.

Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 held back by a gate.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import SECRETS
from jobs.arguments import ConfigFile, Json, Overrides, finish
from jobs.cluster.verbs import verbs as cluster_verbs
from jobs.config_verbs import verbs as config_verbs
from jobs.serving_verbs import verbs as serving_verbs
from jobs.study.verb import verbs as study_verbs
from pipeline.errors import HeldBack, InputError, masked
from pipeline.log_lines import check_format, name_process, record_lines
from pipeline.orchestration.environment import submission_id
from pipeline.progress import is_followed, tell

if TYPE_CHECKING:
    from jobs.config import RunConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    name="mtl-lora",
    help="Train one language model on many industrial tasks, evaluate it and put it in front of traffic.",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cluster_verbs)
app.add_typer(serving_verbs)
app.add_typer(study_verbs)
app.add_typer(config_verbs, name="config")
REFERENCE = "base, run:NAME, models:/NAME@champion, a version number or alias, a folder export/TASK"


def _run(config: Path, overrides: list[str] | None, as_json: bool, verb: Callable[[RunConfig], Any]) -> None:
    from jobs.config import load_config

    loaded = load_config(config, overrides or ())
    name_process(run=loaded.name)
    try:
        finish(verb(loaded), as_json)
    except HeldBack as held:
        if held.result is not None:
            finish(held.result, as_json)
        raise


def _stage(config: RunConfig, name: str, **options: Any) -> Any:
    from jobs.main_job import run_stage
    from jobs.run import Run

    return run_stage(Run(config), name, **options)


def _plain(artefact: Any) -> dict[str, Any]:
    found: dict[str, Any] = artefact.model_dump(mode="json", by_alias=True)
    return found


def _as_job(
    verb: str,
    config: Path,
    overrides: list[str] | None,
    as_json: bool,
    run: Callable[[RunConfig], Any],
    extra: tuple[str, ...] = (),
) -> None:
    """Run a verb inside this Ray job, or, outside of one, submit it as one and wait."""
    from jobs.config import load_config
    from pipeline.orchestration.environment import inside_job

    if inside_job():
        return _run(config, overrides, as_json, run)
    loaded = load_config(config, overrides or ())  # what is wrong with it is said before Ray is imported
    name_process(run=loaded.name)
    from jobs.cluster.submission import run_as_job

    code, result = run_as_job(verb, loaded, extra)
    if result is not None:
        finish(result, as_json)
    raise typer.Exit(code)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"mtl-lora {version_of('mtl-lora')}")  # noqa: T201
        raise typer.Exit


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Record file (JSONL, CSV, Parquet; gzip too), tar, or a folder.")],
    out: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Look at data and write a commented configuration: fields, labels, kind of task, a proposed template."""
    from jobs.first_config import first_config
    from pipeline.contracts import write_atomic
    from pipeline.progress import say

    if out is not None and out.exists() and not force:
        raise InputError(f"--out must be a new file, {out} is there; name another, or give --force to write over it")
    text = first_config(data)
    if out is None:
        print(text, end="")  # noqa: T201
    else:
        write_atomic(out, text)
        say(f"wrote {out}; look at its tasks, then: mtl-lora plan --config {out}")


@app.command()
def doctor(config: ConfigFile = Path("demo"), overrides: Overrides = None, as_json: Json = False) -> None:
    """Check versions, compiler, GPU, cluster, registry, storage, clock, disk and ports; say what to fix."""
    from dataclasses import asdict

    from jobs.config import load_config
    from jobs.doctor.diagnosis import diagnose
    from jobs.doctor.finding import show

    found = diagnose(load_config(config, overrides or ()))
    if not as_json:
        show(found)
    finish({"findings": [asdict(each) for each in found]}, as_json)
    raise typer.Exit(1 if any(each.status == "fail" for each in found) else 0)


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    append: Annotated[bool, typer.Option("--append", help="Add the input to the shards that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Validate the records and write them as WebDataset shards with a manifest."""
    _run(config, overrides, as_json, lambda c: _plain(_stage(c, "prepare", append=append)))


@app.command("image-base")
def image_base(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", help="Folder of the base; one that is there is trained further.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the projector, 64 samples each.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Peak of the projector's learning rate.")] = 1e-3,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Keep SmolLM2's first layers only.")] = None,
    image_size: Annotated[
        int, typer.Option(help="Side in pixels to which images are resized; 128 is 16 tokens.")
    ] = 128,
    as_json: Json = False,
) -> None:
    """Make an image-text base of EfficientNet-Lite0 and SmolLM2, and train the projector between them."""
    from jobs.image_base import image_base as make

    _run(config, overrides, as_json, lambda run: make(run, output, steps, learning_rate, num_layers, image_size))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Run a few micro-batches of the model; else estimate.")
    ] = True,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Only what a rank holds, by ZeRO stage and ranks; needs no data, no weights."),
    ] = False,
    manifests: Annotated[
        Path | None, typer.Option(help="Folder for the files of a Kubernetes deployment of this plan; see infra.")
    ] = None,
    image: Annotated[str, typer.Option(help="Image that these files name, best with its digest.")] = "mtl-lora",
    as_json: Json = False,
) -> None:
    """Say what training will do and take: steps, samples, tokens, time, memory; held back where it cannot fit."""
    from jobs import tables

    def verb(run: RunConfig) -> dict[str, Any]:
        if memory and manifests is not None:
            raise InputError(
                f"--manifests needs a whole plan, got --manifests {manifests} with --memory; leave one of them out"
            )
        if memory:
            from jobs.stages.plan import memory as of_memory

            found = of_memory(run)
            tables.show_memory(found)
            return _plain(found)
        planned = _stage(run, "plan", calibrate=calibrate)
        numbers = _plain(planned)
        tables.show_plan(numbers)
        if manifests is not None:
            from jobs.cluster.manifests import write

            numbers["manifests"] = [str(path) for path in write(run, planned, manifests, image)]
        if misfits := numbers["training"]["misfits"]:
            raise HeldBack("; ".join(misfits), numbers)
        return numbers

    _run(config, overrides, as_json, verb)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the adapter, as a Ray job (on a local cluster where no address is given)."""

    def verb(run: RunConfig) -> dict[str, Any]:
        from jobs import tables
        from jobs.run import Run
        from pipeline.progress import say

        adapter = _stage(run, "train")
        tables.show_training(Run(run).history())
        say(
            f"next: mtl-lora evaluate --config {config}, or everything that is left: mtl-lora retrain --config {config}"
        )
        return {"adapter": str(adapter)}

    _as_job("train", config, overrides, as_json, verb)


@app.command()
def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials, instead of tune.trials.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the search will take, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Search the keys of the configuration's `tune` section; write curves and the best configuration as YAML.

    Judged on the validation split alone. After a kill the same command goes on.
    """
    changed = [*(overrides or []), *([] if trials is None else [f"tune.trials={trials}"])]

    def verb(run: RunConfig) -> dict[str, Any]:
        from jobs.tuning.search import tune as search

        return search(run, dry_run)

    from jobs.config import load_config
    from jobs.tuning.trials import Search

    Search(load_config(config, changed)).trials()  # what is wrong with the space is said before Ray is imported
    if dry_run:
        return _run(config, changed, as_json, verb)
    return _as_job("tune", config, changed, as_json, verb)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Score the trained adapter and the untrained base on the test shards."""
    from jobs import tables

    def verb(run: RunConfig) -> dict[str, Any]:
        found = _stage(run, "evaluate")
        tables.show_evaluation(found.trained, found.base)
        return _plain(found.trained)

    _as_job("evaluate", config, overrides, as_json, verb)


@app.command()
def export(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write each task as a plain PEFT LoRA folder, compared with the model first."""
    _run(config, overrides, as_json, lambda c: {"folders": [str(f) for f in _stage(c, "export").values()]})


@app.command()
def merge(
    config: ConfigFile,
    task: Annotated[str, typer.Option(help="Task whose adapter is merged.")],
    output: Annotated[Path, typer.Option(help="New folder for the model and its tokenizer.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write one task merged into its base, as an ordinary model that transformers alone loads."""
    from jobs.run import Run
    from jobs.stages.merge import merge as write_merged

    def verb(run: RunConfig) -> dict[str, Any]:
        return {"folder": str(write_merged(Run(run), task, output))}

    _run(config, overrides, as_json, verb)


@app.command()
def promote(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Register the adapter as challenger; make it champion if the gates let it pass."""
    from jobs import tables

    def verb(run: RunConfig) -> dict[str, Any]:
        decision = _stage(run, "promote")
        tables.show_decision(decision)
        found = _plain(decision)
        if decision.verdict != "PROMOTE":
            raise HeldBack(f"{decision.verdict}: {'; '.join(decision.reasons)}", found)
        return found

    _run(config, overrides, as_json, verb)


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    candidate: Annotated[str | None, typer.Option(help=f"Model to judge: {REFERENCE}. [default: the run]")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to judge it by. [default: the champion; the base where there is none]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare any two models on the run's test samples, in pairs."""
    from jobs import tables
    from jobs.run import Run
    from jobs.stages.compare import compare_any

    def verb(run: RunConfig) -> dict[str, Any]:
        found = compare_any(Run(run), candidate, reference)
        tables.show_comparison(found)
        return _plain(found)

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
    from jobs.run import Run

    def verb(run: RunConfig) -> dict[str, Any]:
        registry = Run(run).registry
        entry = registry.rollback(to, why)
        return {"model": registry.name, "champion": entry.version, "instead_of": entry.previous}

    _run(config, overrides, as_json, verb)


@app.command()
def lineage(
    config: ConfigFile,
    of: Annotated[str, typer.Option(help="Version number, alias, or a day such as 2026-05-03.")] = "champion",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say which data, code and parent made a version, or the champion of a day."""
    from jobs import tables
    from jobs.run import Run
    from pipeline.promotion.lineage import lineage as lineage_of

    def verb(run: RunConfig) -> dict[str, Any]:
        rows = lineage_of(Run(run).registry, of).rows()
        tables.show_lineage(rows)
        return rows

    _run(config, overrides, as_json, verb)


@app.command()
def report(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the run's report, one HTML page."""
    _run(config, overrides, as_json, lambda c: {"report": str(_stage(c, "report"))})


Day = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Look at no partition after this day; today by default.")
]


@app.command()
def retrain(
    config: ConfigFile,
    overrides: Overrides = None,
    as_of: Day = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read, trained and compared, and stop.")
    ] = False,
    backfill: Annotated[
        tuple[datetime, datetime] | None,
        typer.Option(formats=["%Y-%m-%d"], metavar="FROM TO", help="Retrain as of each day, every_days apart."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every stage, raw records to registry, as one Ray job.

    With `retraining` in the configuration: on the daily partitions that are newer than the champion's.
    """
    from jobs.config import load_config
    from pipeline.orchestration.environment import inside_job

    loaded = load_config(config, overrides or ())  # what is wrong with it is said before anything heavy is imported
    from jobs.main_job import passed
    from jobs.weekly.loop import backfill as run_back
    from jobs.weekly.loop import nothing_to_do
    from jobs.weekly.loop import retrain as run_all

    day = as_of.date() if as_of else None
    if backfill is not None and (day or dry_run):
        raise InputError("--backfill names its days itself, got --as-of or --dry-run with it; leave one of them out")
    if dry_run:
        return _run(config, overrides, as_json, lambda c: run_all(c, day, dry_run=True))
    extra = ["--as-of", day.isoformat()] if day else []
    if backfill is None:
        if not inside_job() and (done := nothing_to_do(loaded, day)) is not None:
            return _run(config, overrides, as_json, lambda _: passed(done))
        return _as_job("retrain", config, overrides, as_json, lambda c: run_all(c, day), tuple(extra))
    first, last = (moment.date() for moment in backfill)
    if first > last:
        raise InputError(f"--backfill must run forwards, got {first} to {last}; swap the days")
    extra = ["--backfill", first.isoformat(), last.isoformat()]
    return _as_job("retrain", config, overrides, as_json, lambda c: run_back(c, first, last), tuple(extra))


@app.command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Retrain by the configuration's cron line, on this machine, until stopped; on a cluster: plan --manifests."""
    from jobs.config import load_config
    from jobs.weekly.schedule import schedule as run_schedule

    run_schedule(load_config(config, overrides or ()))


@app.command()
def demo(config: ConfigFile = Path("demo"), overrides: Overrides = None, as_json: Json = False) -> None:
    """Run every stage on synthetic Ads data, into runs/demo."""
    from jobs.weekly.loop import retrain as run_all

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


def _check_secrets() -> None:
    """Refuse to run where the environment lacks a secret that the submitter named."""
    missing = [name for name in os.environ.get(SECRETS, "").split(",") if name and not os.environ.get(name)]
    if missing:
        raise InputError(
            f"the cluster's environment must hold the secrets that were named, lacks {missing}; "
            "give them to its containers (envFrom: secretRef), never to the job"
        )


def main() -> None:
    """Run the command and turn errors into exit codes."""
    # A polite kill must run the clean-up that stops the job and the local cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name_process(job=submission_id())
    with record_lines(also_output=is_followed()):
        try:
            check_format()
            _check_secrets()
            app()
        except InputError as error:
            tell(f"error: {masked(str(error))}")
            sys.exit(2)
        except HeldBack as error:
            tell(f"held back: {masked(str(error))}")
            sys.exit(3)
        except Exception:  # noqa: BLE001 - printed as Python would, but for the passwords
            tell(masked(traceback.format_exc().rstrip()))
            sys.exit(1)


if __name__ == "__main__":
    main()
