"""A registered version's LoggedModel shows its run, data sets, metrics and version, however often it was begun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from pipeline.promotion.integrity import digests
from pipeline.promotion.logged_model import MODEL_ID, log_model
from pipeline.promotion.packaging import package
from pipeline.promotion.registry import Registry
from pipeline.tracking import DataSet, Tracker
from tests.pipeline.promotion.conftest import add_version, made_from, promote, write_adapter
from tests.pipeline.promotion.test_registry import DyingClient, Killed

MANIFEST = "a" * 64


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with package(write_adapter(tmp_path_factory.mktemp("packed") / "adapter"), "# card", bundle_base=False) as model:
        yield model


def evaluated_run(store: str) -> Tracker:
    """Open a run with its parameters, data sets and metrics, as a finished evaluation leaves it."""
    client = Registry("any", store)._client
    tracker = Tracker(store, client.create_run(client.get_experiment_by_name("test").experiment_id).info.run_id)
    tracker.log_parameters({"adapter": {"r": 8}})
    for context, split in (("training", "train"), ("evaluation", "test")):
        tracker.log_data(DataSet(context, split, "s3://shards/manifest.json", MANIFEST, {"query_ad": 5}))
    tracker.log_metrics({"loss": 0.5}, 3)
    tracker.log_metrics({"test/query_ad/auc": 0.75, "test/macro": 0.7}, 7)
    return tracker


def test_logged_model_shows_run_parameters_metrics_data_and_version(store: str, adapter: Path) -> None:
    from mlflow.models import Model

    tracker, registry = evaluated_run(store), Registry("shown.in 1", store)
    client = registry._client
    made = registry.register(adapter, run_id=tracker.run_id, provenance=made_from(), bundle_base=False)
    model_id = client.get_model_version(registry.name, str(made.number)).tags[MODEL_ID]
    model = client.get_logged_model(model_id)
    assert (str(model.status), model.name, model.source_run_id) == ("READY", "shown-in 1", tracker.run_id)
    assert model.params == {"adapter.r": "8"}
    assert {m.key: (m.value, m.step, m.dataset_name, m.dataset_digest) for m in model.metrics} == {
        "test/query_ad/auc": (0.75, 7, "test", MANIFEST[:36]),
        "test/macro": (0.7, 7, "test", MANIFEST[:36]),
    }
    assert model.tags["mlflow.modelVersions"] == '[{"name": "shown.in 1", "version": 1}]'
    assert [one.model_id for one in client.get_run(tracker.run_id).outputs.model_outputs] == [model_id]
    assert made.source == model.artifact_location
    described = Model.load(urlparse(made.source).path)
    assert (described.model_id, described.run_id) == (model_id, tracker.run_id)
    assert described.signature is not None


def test_the_metrics_of_other_samples_name_no_data_set(store: str, packed: Path) -> None:
    tracker = evaluated_run(store)
    model = log_model(Tracker(store, "")._client, tracker.run_id, "other", packed, "b" * 64)
    assert {m.dataset_name for m in Tracker(store, "")._client.get_logged_model(model.model_id).metrics} == {None}


def test_logging_killed_before_any_call_is_gone_on_with(store: str, packed: Path) -> None:
    client: Any = Registry("any", store)._client
    for calls in range(40):
        tracker = evaluated_run(store)
        try:
            log_model(DyingClient(client, calls), tracker.run_id, "killed", packed, MANIFEST)
            finished = True
        except Killed:
            finished = False
        model = log_model(client, tracker.run_id, "killed", packed, MANIFEST)
        run = client.get_run(tracker.run_id)
        found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{tracker.run_id}'")
        assert [(one.model_id, str(one.status)) for one in found] == [(model.model_id, "READY")]
        assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
        assert len(client.get_logged_model(model.model_id).metrics) == 2
        assert len(client.get_metric_history(tracker.run_id, "test/macro")) == 1
        assert [file.path for file in client.list_logged_model_artifacts(model.model_id) if file.path == "MLmodel"]
        if finished:
            break
    assert calls > 6


def test_another_package_of_the_same_run_is_another_model(store: str, packed: Path, adapter: Path) -> None:
    client, run_id = Registry("any", store)._client, evaluated_run(store).run_id
    first = log_model(client, run_id, "twice", packed, MANIFEST)
    with package(adapter, "# another card", bundle_base=False) as other:
        second = log_model(client, run_id, "twice", other, MANIFEST)
    assert first.model_id != second.model_id


def test_a_version_that_was_not_yet_shown_on_its_model_is_when_it_challenges(store: str, adapter: Path) -> None:
    registry = Registry("unlinked", store)
    number = add_version(registry, adapter)
    model_id = registry._client.get_model_version(registry.name, str(number)).tags[MODEL_ID]
    registry._client.delete_logged_model_tag(model_id, "mlflow.modelVersions")
    for _ in range(2):
        registry.challenge(number)
        tags = registry._client.get_logged_model(model_id).tags
        assert tags["mlflow.modelVersions"] == '[{"name": "unlinked", "version": 1}]'


def test_a_version_whose_files_lie_with_its_run_is_found_promoted_and_fetched(
    store: str, adapter: Path, packed: Path, tmp_path: Path
) -> None:
    registry = Registry("earlier", store)
    client, run_id = registry._client, evaluated_run(store).run_id
    client.log_artifacts(run_id, str(packed), "model")
    client.create_registered_model(registry.name)
    origin = made_from(adapter_sha256=digests(adapter)["adapter_model.safetensors"])
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    client.create_model_version(registry.name, source, run_id, tags=origin.tags())
    assert registry.find(origin.identity) == registry.version(1)
    registry.challenge(1)
    promote(registry, "challenger")
    fetched = registry.download("champion", tmp_path / "fetched")
    assert (fetched / "predictor.json").read_bytes() == (adapter / "predictor.json").read_bytes()
