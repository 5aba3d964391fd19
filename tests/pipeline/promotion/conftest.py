from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.contracts import PromotionDecision, TaskSpec
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import PredictorSpec
from pipeline.promotion.entries import Entry
from pipeline.promotion.provenance import Provenance
from pipeline.promotion.registry import Registry, Version

TASKS = (
    TaskSpec(name="query_ad", template="Query: {query}\nAd: {ad}\nRelevant?", label_words=(" no", " yes")),
    TaskSpec(name="pick", kind="choice", template="{query}\nAnswer:"),
)
PROMOTE = PromotionDecision(verdict="PROMOTE", reasons=("better",), candidate="c", champion=None, tasks={})
_numbers = itertools.count()


def promote(registry: Registry, reference: int | str) -> Entry:
    """Promote by a verdict against the champion that there is."""
    chain = registry.ledger.chain()
    champion = str(chain[-1].version) if chain else None
    candidate = str(registry.version(reference).number)
    return registry.promote(reference, PROMOTE.model_copy(update={"candidate": candidate, "champion": champion}))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh sqlite store, made once."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri, uri).create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
    return uri


def write_adapter(folder: Path) -> Path:
    folder.mkdir()
    save_file({"layer.A": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    (folder / "mtl_lora_config.json").write_text('{"version": 1, "config": {}, "base": null}')
    PredictorSpec(tasks=TASKS, base=BaseModelConfig(num_layers=2)).write(folder / "predictor.json")
    return folder


def write_moved_adapter(folder: Path, seed: int = 0) -> Path:
    """Write a real adapter on one real layer, its weights moved so that it does answer."""
    base = BaseModelConfig(num_layers=1)
    torch.manual_seed(seed)
    adapted: Any = build_adapter(AdapterConfig(), load_base(base), [task.name for task in TASKS])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    PredictorSpec(tasks=TASKS, base=base).write(folder / "predictor.json")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A predictor's folder in form: small tensors, never run."""
    return write_adapter(tmp_path / "adapter")


def made_from(**known: Any) -> Provenance:
    return Provenance(**{"run": "weekly", "manifest_sha256": "a" * 64, "tasks": ("query_ad", "pick"), **known})


def add_version(registry: Registry, adapter: Path, **known: Any) -> int:
    client = registry._client
    run = client.create_run(client.get_experiment_by_name("test").experiment_id)
    return registry.register(adapter, run_id=run.info.run_id, provenance=made_from(**known), bundle_base=False).number


@pytest.fixture(scope="session")
def stored(store: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """One version whose files the versions of other models point at too."""
    registry = Registry("stored", store)
    adapter = write_adapter(tmp_path_factory.mktemp("stored") / "adapter")
    return registry.version(add_version(registry, adapter))


def copy_version(registry: Registry, stored: Version) -> int:
    tags = stored.provenance.tags()
    return int(registry._client.create_model_version(registry.name, stored.source, stored.run_id, tags=tags).version)


@pytest.fixture
def registry(store: str, stored: Version) -> Registry:
    """A model of its own in the shared store, with three versions, none of them champion."""
    registry = Registry(f"model-{next(_numbers)}", store)
    registry._client.create_registered_model(registry.name)
    for _ in range(3):
        copy_version(registry, stored)
    registry._client.set_registered_model_alias(registry.name, "challenger", "1")
    return registry


@pytest.fixture
def aliases() -> Callable[[Registry], dict[str, int]]:
    def read(registry: Registry) -> dict[str, int]:
        found = registry._client.get_registered_model(registry.name).aliases
        return {name: int(version) for name, version in found.items()}

    return read
