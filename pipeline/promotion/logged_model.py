"""The packaged model in MLflow's tracking: a LoggedModel, which shows run, data sets, metrics and versions together.

Every step can be taken again: a process killed at any point leaves a model that the next call goes on with.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipeline.json_text import parse_json
from pipeline.promotion.integrity import digests
from pipeline.promotion.packaging import DIGESTS

MODEL_ID = "model_id"
"""Tag of a version: the LoggedModel it came from; versions of earlier releases have none."""
MEASURED = "test/"
"""What the names of the run's metrics begin with that were measured on the model that is logged."""
EVALUATION = "evaluation"
"""Context of the data set that they were measured on."""
_CONTENT = "content_sha256"
_VERSIONS = "mlflow.modelVersions"
"""Where MLflow's page of a LoggedModel looks for its versions."""
_CONTEXT = "mlflow.data.context"
_REFUSED = re.compile(r"[/:.%\"']")
"""What the name of a LoggedModel must not hold."""


def log_model(client: Any, run_id: str, name: str, package: Path, manifest_sha256: str) -> Any:
    """Store a package as a LoggedModel of a run, with the run's parameters and measured metrics; READY at the end.

    Args:
        client: of MLflow.
        run_id: the run that made it.
        name: of the registered model; the LoggedModel's is the same where MLflow allows it.
        package: folder of :func:`pipeline.promotion.packaging.package`; its ``MLmodel`` is given the model's id.
        manifest_sha256: of the samples that the metrics were measured on.

    Returns:
        The LoggedModel; the one that stands where this run has stored the same package before.
    """
    run, content = client.get_run(run_id), _content(package)
    model = _standing(client, run, content) or client.create_logged_model(
        run.info.experiment_id,
        name=_REFUSED.sub("-", name),
        source_run_id=run_id,
        tags={_CONTENT: content},
        params=dict(run.data.params),
    )
    _attach(client, run, model, manifest_sha256)
    if str(model.status) == "READY":
        return model
    _name_model(package, model)
    client.log_model_artifacts(model.model_id, str(package))
    return client.finalize_logged_model(model.model_id, "READY")


def link(client: Any, model_id: str, name: str, number: int) -> None:
    """Show a registered version on its LoggedModel's page, as a server does by itself."""
    listed = parse_json(client.get_logged_model(model_id).tags.get(_VERSIONS, "[]"))
    if not any((one["name"], int(one["version"])) == (name, number) for one in listed):
        listed.append({"name": name, "version": number})
        client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps(listed)})


def _content(package: Path) -> str:
    """Digest what is packed, the weights by their listed hashes; ``MLmodel`` bears the time and is left out."""
    files = [path for path in package.iterdir() if path.is_file() and path.name != "MLmodel"]
    texts = {path.name: path.read_text() for path in [*files, package / "artifacts" / f"{DIGESTS}.json"]}
    return hashlib.sha256(json.dumps([texts, digests(package / "code")], sort_keys=True).encode()).hexdigest()


def _standing(client: Any, run: Any, content: str) -> Any | None:
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return next((model for model in found if model.tags.get(_CONTENT) == content), None)


def _attach(client: Any, run: Any, model: Any, manifest_sha256: str) -> None:
    """Name the model as the run's output and give it the metrics measured on it, where it has them not yet."""
    from mlflow.entities import LoggedModelOutput, Metric

    outputs = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in {one.model_id for one in outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    data = _evaluated(run, manifest_sha256)
    # As they were measured, with time and step: the run has them already, and MLflow stores the same row once.
    rows = [client.get_metric_history(run.info.run_id, key)[-1] for key in run.data.metrics if key.startswith(MEASURED)]
    metrics = [Metric(r.key, r.value, r.timestamp, r.step, model.model_id, *data, run_id=run.info.run_id) for r in rows]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + 1000])


def _evaluated(run: Any, manifest_sha256: str) -> tuple[str | None, str | None]:
    """Return name and digest of the run's data set that was evaluated on, Nones where the run does not name it."""
    for one in run.inputs.dataset_inputs if run.inputs else []:
        read_for = {tag.value for tag in one.tags if tag.key == _CONTEXT}
        if EVALUATION in read_for and manifest_sha256.startswith(one.dataset.digest):
            return one.dataset.name, one.dataset.digest
    return None, None


def _name_model(package: Path, model: Any) -> None:
    """Write the LoggedModel's id into ``MLmodel``, so that what loads it says which model it is."""
    from mlflow.models import Model

    description = Model.load(str(package))
    description.model_id = description.model_uuid = model.model_id
    description.run_id, description.artifact_path = model.source_run_id, model.artifact_location
    description.save(str(package / "MLmodel"))
