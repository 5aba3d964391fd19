"""A served model on a machine of its own: fetched once, on the base that came with it, and not piled up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.promotion.registry import Registry, Version
from pipeline.serving import served_model
from pipeline.serving.served_model import KEPT, ServedModel
from tests.pipeline.modeling.tiny import tiny_model, tiny_tokenizer
from tests.pipeline.promotion.conftest import (  # noqa: F401 - fixtures
    TASKS,
    copy_version,
    made_from,
    registry,
    store,
    stored,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))


def test_the_versions_that_were_asked_for_last_are_kept(
    registry: Registry,  # noqa: F811
    stored: Version,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(KEPT):
        copy_version(registry, stored)
    found = [ServedModel(registry.name, number, registry.uri).folder() for number in range(1, KEPT + 4)]
    assert all(folder.is_dir() for folder in found)  # each was asked for within the hour
    monkeypatch.setattr(served_model, "_IN_USE_S", 0.0)
    for age, folder in enumerate(found):
        os.utime(folder, (age, age))
    found[0].touch()
    copy_version(registry, stored)
    newest = ServedModel(registry.name, KEPT + 4, registry.uri).folder()
    assert {folder for folder in (*found, newest) if folder.is_dir()} == {newest, found[0], *found[1 - KEPT + 1 :]}


def test_a_base_that_is_not_here_comes_from_the_registry(store: str, tmp_path: Path) -> None:  # noqa: F811
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")  # in which it travels
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = BaseModelConfig(base=str(tmp_path / "base"), dtype="float32", max_length=64)
    adapted = build_adapter(AdapterConfig(), load_base(base), [task.name for task in TASKS])
    adapted.save_pretrained(tmp_path / "adapter")
    PredictorSpec(tasks=TASKS, base=base).write(tmp_path / "adapter/predictor.json")
    rows = pd.DataFrame([{"task": "query_ad", "query": "red shoes", "ad": "buy"}])
    wanted = Predictor.load(tmp_path / "adapter", "cpu").predict(rows)["score"][0]
    registry = Registry("with-base", store)  # noqa: F811
    run = registry._client.create_run(registry._client.get_experiment_by_name("test").experiment_id).info.run_id
    for bundle in (True, False):
        registry.register(tmp_path / "adapter", run_id=run, provenance=made_from(), bundle_base=bundle)
    shutil.rmtree(tmp_path / "base")
    for _ in range(2):
        found = ServedModel("with-base", 1, store).load()
        assert found.predict(rows)["score"][0] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(InputError, match=r"model\.base"):
        ServedModel("with-base", 2, store).load()
