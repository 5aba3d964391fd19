"""The verbs that put a model in front of traffic: score files, serve requests."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.arguments import ConfigFile, Json, Overrides, finish
from pipeline.errors import InputError, masked
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from pipeline.serving.server_config import ServerConfig

verbs = typer.Typer()
Model = Annotated[
    str, typer.Option(help="models:/NAME@champion, models:/NAME/NUMBER, or the folder of a trained adapter.")
]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", help="Registry of the model. [default: sqlite in ./runs]"),
]
Address = Annotated[
    str, typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster to use; a local one where none is named.")
]


@verbs.command()
def score(
    model: Model,
    input: Annotated[str, typer.Option(help="Record files or shards: a file, a folder or a glob, local or remote.")],
    output: Annotated[str, typer.Option(help="Folder for the scores, a Parquet file an input file.")],
    task: Annotated[str | None, typer.Option(help="Task of rows without a column task.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Field to carry into the output; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that hold the model, a GPU each where there are.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens through the model at once.")] = 2048,
    explain: Annotated[bool, typer.Option("--explain", help="Write each label word's log-likelihood, too.")] = False,
    max_rejected_share: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of rows that may be put aside.")
    ] = 0.05,
    tracking_uri: TrackingUri = None,
    address: Address = "",
    as_json: Json = False,
    reading: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[data.key=value]...", help="How the files are written, over what the model was trained on."
        ),
    ] = None,
) -> None:
    """Score files of any size, rows of all tasks mixed; the same command goes on where an earlier one was killed.

    Files are read by the dialects, encodings and columns that the model's own data was read by, unless told otherwise:
    data.csv.delimiter=";", data.csv.encoding=cp1252, data.json_encoding=…, data.columns.id=…, data.task_field=….
    """
    from pipeline.serving.batch_output import COLUMNS

    if wrong := sorted(set(keep or ()) & set(COLUMNS)):
        raise InputError(f"--keep must name fields that are no columns of the scores, got {wrong}; leave them out")
    from jobs import tables
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
    from pipeline.orchestration.cluster import cluster
    from pipeline.orchestration.config import RayConfig
    from pipeline.serving.batch import ScoringJob, score_files

    served = _served(model, tracking_uri)
    spec = PredictorSpec.read(served.folder() / PREDICTOR_FILE)
    job = ScoringJob(
        model=served.words,
        load=partial(served.load, batch_tokens),
        tasks=spec.tasks,
        input=input,
        output=output,
        task=task,
        keep=tuple(keep or ()),
        num_workers=workers,
        max_rejected_share=max_rejected_share,
        explain=explain,
        data=_reading(spec.reading, reading or []),
    )
    with cluster(RayConfig(address=address)):
        manifest = score_files(job)
    tables.show_scores(manifest, output)
    finish(manifest.model_dump(mode="json", by_alias=True), as_json)


@verbs.command()
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than the loopback need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the model.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="About so many tokens are answered together.")] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows of a request.")] = 256,
    max_waiting_rows: Annotated[int, typer.Option(min=1, help="Rows that may wait; more get 429.")] = 1024,
    timeout_s: Annotated[float, typer.Option(min=0.01, help="Longest time of a request; longer ones get 503.")] = 10.0,
    poll_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the registry's alias.")] = 5.0,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that the challenger scores and never answers.")
    ] = 0.0,
    canary: Annotated[
        float, typer.Option(min=0, max=1, help="Share of keys that the challenger answers, till it falls behind.")
    ] = 0.0,
    log: Annotated[str, typer.Option(help="Folder for the scores of champion and challenger.")] = "",
    drift_against: Annotated[str, typer.Option(help="Shards of the training that live texts are held against.")] = "",
    tracking_uri: TrackingUri = None,
    address: Address = "",
) -> None:
    """Answer requests over HTTP until stopped, with the version that the alias names at the time.

    Where MTL_LORA_SERVE_TOKEN is set, clients must bring it. See /docs of the server for its requests.
    """
    from pydantic import ValidationError

    from pipeline.orchestration.cluster import cluster
    from pipeline.orchestration.config import RayConfig
    from pipeline.progress import say
    from pipeline.serving.server import TOKEN, run_server
    from pipeline.serving.server_config import ServerConfig

    known: dict[str, Any] = {
        "model": model,
        "tracking_uri": _told_registry(tracking_uri),
        "shadow": {"share": shadow},
        "canary": {"share": canary},
        "log": {"url": _absolute(log)},
        "drift_against": _absolute(drift_against),
        "replicas": replicas,
        "batch_tokens": batch_tokens,
        "max_rows": max_rows,
        "max_waiting_rows": max_waiting_rows,
        "timeout_s": timeout_s,
        "poll_s": poll_s,
        "needs_token": bool(os.environ.get(TOKEN)),
    }
    try:
        config = ServerConfig(**known)
    except ValidationError as error:
        raise InputError("; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())) from error
    # Ray sets its workers back behind all other processes, which would answer first while somebody waits for these.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with cluster(RayConfig(address=address)):
        run_server(config, host, port)
        say(
            f"serving {model} at http://{host}:{port}: POST /v1/score, GET /v1/tasks, /docs, /metrics; stop with Ctrl-C"
        )
        watch(config, threading.Event())


def watch(config: ServerConfig, stop: threading.Event) -> None:
    """Tell people what the server writes down of a challenger and of drift, until it is stopped."""
    from jobs.notices import NoticesConfig, notify
    from pipeline.progress import say
    from pipeline.serving.live_log import read_state

    said: dict[str, Any] = read_state(config.log.url) if config.log.url else {}
    while not stop.wait(config.poll_s):
        if not config.log.url:
            continue
        try:
            found = read_state(config.log.url)
        except (OSError, ValueError) as error:  # its store may be away
            say(f"{config.log.url} could not be read: {masked(str(error))}")
            continue
        send = partial(notify, NoticesConfig(), Path("runs") / "notices.jsonl", model=config.model)
        for version in found["taken_back"].keys() - said["taken_back"].keys():
            send(event="TAKEN_BACK", reasons=[found["taken_back"][version]], version=version)
        if found["drift"] and found["drift"] != said["drift"]:
            send(event="DRIFT", reasons=found["drift"])
        said = found


@verbs.command()
def feedback(
    config: ConfigFile,
    overrides: Overrides = None,
    labels: Annotated[str, typer.Option(help="Record files with label, and request and row, or id.")] = "",
    as_json: Json = False,
) -> None:
    """Keep labels of live requests that have come later, for promotion.live and for the canary's calibration."""
    from jobs.config import load_config
    from jobs.live_evidence import feedback as keep
    from pipeline.progress import say

    if not labels:
        raise InputError("--labels must name record files of labels, got none; see mtl-lora feedback --help")
    found = keep(load_config(config, overrides or ()), labels)
    say(f"{found['labels']:,} labels kept; labelled rows by version: {found['rows'] or 'none'}")
    for version, why in found["taken_back"].items():
        say(f"{version} is taken back as a canary: {why}")
    finish(found, as_json)


def _absolute(url: str) -> str:
    """Return a location as every process of the cluster understands it."""
    return str(Path(url).expanduser().resolve()) if url and not is_remote(url) else url


def _reading(known: dict[str, Any], overrides: list[str]) -> Any:
    """Return how files are read: as the model knows, with overrides over that."""
    from pydantic import ValidationError

    from jobs.config_file import overridden
    from pipeline.ingestion import DataConfig

    values = overridden({"data": known}, overrides)
    wrong = sorted({*values} - {"data"}) or sorted({*values["data"]} - DataConfig.READING)
    if wrong:
        raise InputError(
            f"score takes keys of data that say how files are written ({', '.join(sorted(DataConfig.READING))}), got "
            f"{wrong}; leave them out"
        )
    try:
        return DataConfig.model_validate({**values["data"], "source": "records", "root": "."})
    except ValidationError as error:
        raise InputError("; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())) from error


def _registry(tracking_uri: str | None) -> str:
    from pipeline.tracking import TrackingConfig

    return TrackingConfig(uri=tracking_uri or "").resolved(Path("runs")).uri


def _told_registry(tracking_uri: str | None) -> str:
    """Return the registry's address as a server's configuration may hold it, which all who see the cluster see.

    One with a password goes into this process's environment, which a local cluster takes from here, and is empty then.
    """
    from pipeline.tracking import TrackingConfig

    found = TrackingConfig(uri=_registry(tracking_uri))
    if found.is_secret:
        os.environ["MLFLOW_TRACKING_URI"] = found.uri
    return "" if found.is_secret else found.uri


def _served(model: str, tracking_uri: str | None) -> Any:
    from pipeline.serving.served_model import resolve

    return resolve(model, _registry(tracking_uri))
