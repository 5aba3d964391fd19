"""A team's tracking server for real: PostgreSQL, SeaweedFS and MLflow, lost and brought back from a backup."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from infra.mlflow import backup, services
from infra.mlflow.__main__ import main
from infra.mlflow.settings import BUCKET, Settings
from pipeline.errors import InputError
from pipeline.promotion.integrity import digests
from pipeline.promotion.lineage import lineage
from pipeline.promotion.registry import Registry
from tests.infra.mlflow.conftest import destroy
from tests.jobs.weekly import bring, registry_of, retrain, settings
from tests.pipeline.promotion.conftest import made_from, promote, write_moved_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WORKERS", "1")


def answers(registry: Registry) -> list[dict[str, Any]]:
    """What the champion says of two rows, loaded from the registry."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", registry.uri)
        model = mlflow.pyfunc.load_model(f"models:/{registry.name}@champion")
    champion = registry.champion()
    assert champion is not None
    task = champion.provenance.tasks[0]
    texts = {name: ["red shoes", "cheap flights"] for name in ("query", "ad", "keyword")}
    rows = pd.DataFrame({"task": [task] * 2, **texts})
    return model.predict(rows).to_dict("records")


def register(registry: Registry, adapter: Path) -> int:
    """Register a real adapter's folder as the next version, as a run of its own."""
    from mlflow import MlflowClient

    client = MlflowClient(registry.uri, registry.uri)
    run = client.create_run("0").info.run_id
    return registry.register(adapter, run_id=run, provenance=made_from(), bundle_base=False).number


def test_a_lost_stack_is_restored_and_its_champion_answers_the_same(
    made: Callable[[], Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made()
    assert main(["start", "--data", str(first.data)]) == 0
    assert main(["status", "--data", str(first.data)]) == 0
    assert main(["migrate", "--data", str(first.data)]) == 2  # not under a server
    adapter = write_moved_adapter(tmp_path / "adapter")
    registry = Registry("ads", first.tracking_uri)
    for _ in range(2):
        promote(registry, register(registry, adapter))
    registry.rollback(why="clicks fell")
    said = answers(registry)

    kept = tmp_path / "backups" / "monday"
    step, steps = backup._copy_bucket, []
    monkeypatch.setattr(backup, "_copy_bucket", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["backup", "--data", str(first.data), str(kept)])
    assert not kept.exists()

    def registering(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*given: Any) -> Any:
            done = act(*given)
            steps.append(name)
            if len(steps) == 1:  # a client registers a version between the two steps, whichever comes first
                assert register(registry, adapter) == 3
            return done

        return acted

    monkeypatch.setattr(backup, "_copy_bucket", registering("bucket", step))
    monkeypatch.setattr(backup, "_dump", registering("database", backup._dump))
    assert main(["backup", "--data", str(first.data), str(kept)]) == 0
    assert len(steps) == 2
    assert main(["backup", "--data", str(first.data), str(kept)]) == 2  # never over another
    destroy(first)
    assert main(["status", "--data", str(first.data)]) == 2

    second = made()
    services.start_s3(second)
    services.s3_client(second).put_object(Bucket=BUCKET, Key="foreign", Body=b"")
    with pytest.raises(InputError, match="holds 1 other objects, foreign among them"):
        backup.restore(second, kept)
    services.s3_client(second).delete_object(Bucket=BUCKET, Key="foreign")
    assert main(["restore", "--data", str(second.data), str(kept)]) == 0
    assert main(["start", "--data", str(second.data)]) == 0
    with pytest.raises(InputError, match=r"restored into an empty stack, the database of .* tables"):
        backup.restore(second, kept)
    registry = Registry("ads", second.tracking_uri)
    assert answers(registry) == said
    traced = lineage(registry, datetime.now(UTC).date().isoformat())
    assert (traced.version.number, traced.entry.why) == (1, ("clicks fell",))
    for version in registry._client.search_model_versions("name='ads'"):
        assert digests(registry.download(version.version, tmp_path / version.version)) == digests(adapter)

    assert main(["stop", "--data", str(second.data)]) == 0
    assert main(["status", "--data", str(second.data)]) == 1
    assert main(["stop", "--data", str(second.data)]) == 0


OLDER = """
import sys
from alembic import command
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base

engine = utils.create_sqlalchemy_engine_with_retry(sys.argv[1])
Base.metadata.create_all(engine)
config = utils._get_alembic_config(sys.argv[1])
with engine.begin() as session:
    config.attributes["connection"] = session
    command.upgrade(config, utils._get_latest_schema_revision() + "-3")
"""


def test_an_older_schema_is_refused_and_migrated(made: Callable[[], Settings]) -> None:
    stack = made()
    subprocess.run([sys.executable, "-c", OLDER, stack.database_uri], env=stack.environment(), check=True)
    older, latest = services.revision(stack), services.installed_revision()
    assert older != latest
    with pytest.raises(InputError, match=rf"installed MLflow, {latest}, it has {older}; .*: migrate"):
        services.start_mlflow(stack)
    assert backup.migrate(stack) == (older, latest)


@pytest.mark.nightly
def test_a_restored_stack_goes_on_with_the_next_week(
    made: Callable[[], Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made()
    services.start(first)
    small: dict[str, Any] = {"model": {"num_layers": 1}, "training": {"max_steps": 2}}
    path = settings(tmp_path, tasks=1, tracking={"uri": first.tracking_uri}, **small)
    bring(tmp_path / "partitions", 0, 3, tasks=1)
    assert '"verdict": "PROMOTE"' in retrain(path)
    said = answers(registry_of(path))
    backup.backup(first, tmp_path / "kept")
    destroy(first)

    second = made()
    backup.restore(second, tmp_path / "kept")
    services.start(second)
    path = settings(tmp_path, tasks=1, tracking={"uri": second.tracking_uri}, **small)
    assert answers(registry_of(path)) == said
    bring(tmp_path / "partitions", 3, 3, tasks=1)
    assert '"verdict": "PROMOTE"' in retrain(path)
    champion = registry_of(path).champion()
    assert champion is not None
    assert (champion.number, champion.provenance.parent) == (2, 1)
