"""The verbs that put a model in front of traffic: score files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.arguments import Json, finish
from pipeline.errors import InputError

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
    input: Annotated[str, typer.Option(help="Record files: a file, a folder or a glob, local or remote.")],
    output: Annotated[str, typer.Option(help="Folder for the scores, a Parquet file an input file.")],
    task: Annotated[str | None, typer.Option(help="Task of rows without a column task.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Field to carry into the output; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that hold the model, a GPU each where there are.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens through the model at once.")] = 2048,
    max_rejected_share: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of rows that may be put aside.")
    ] = 0.05,
    tracking_uri: TrackingUri = None,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Score files of any size, rows of all tasks mixed; the same command goes on where an earlier one was killed."""
    from pipeline.serving.batch_files import COLUMNS

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
    )
    with cluster(RayConfig(address=address)):
        manifest = score_files(job)
    tables.show_scores(manifest, output)
    finish(manifest.model_dump(mode="json", by_alias=True), as_json)


def _served(model: str, tracking_uri: str | None) -> Any:
    from pipeline.serving.served_model import resolve
    from pipeline.tracking import TrackingConfig

    return resolve(model, TrackingConfig(uri=tracking_uri or "").resolved(Path("runs")).uri)
