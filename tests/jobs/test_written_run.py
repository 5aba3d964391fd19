"""A run whose answers are written, from a cut-off evaluation to the registry: each door hands on the same texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from jobs.config import RunConfig
from jobs.main_job import run_stage
from jobs.run import Run
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor, PredictorSpec
from pipeline.orchestration.cluster import cluster as ray_cluster
from pipeline.orchestration.config import RayConfig
from pipeline.progress import Track
from pipeline.serving.batch import ScoringJob, score_files
from pipeline.stream import read_split
from pipeline.tracking import TrackingConfig
from tests.pipeline.training.ranks import text_tasks, tiny_base, write_text_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GATES = {"beat_base": False, "min_samples": 1, "min_rarer_class": 1, "gain": "none", "margin": 1.0}


class _CutOff(Exception):
    pass


def _made(root: Path, name: str) -> Run:
    """Return a prepared run whose adapter was not trained but moved at random."""
    base = BaseModelConfig(base=str(root / "base"), dtype="float32", max_length=64)
    config = RunConfig(
        name=name,
        run_root=root / "runs",
        data={"source": "records", "root": str(root / "in")},
        tasks=tuple(text_tasks()),
        model=base,
        adapter=AdapterConfig(r=4),
        training={"global_batch_size": 8, "num_workers": 1},
        evaluation={"num_workers": 1},
        promotion={"model_name": "writer", "gates": GATES},
        tracking=TrackingConfig().resolved(root / "runs"),
    )
    run = Run(config)
    run.folder.bind(config.digest())
    run_stage(run, "prepare")
    torch.manual_seed(0)
    adapted: Any = build_adapter(config.adapter, load_base(base), [task.name for task in config.tasks])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(run.folder.adapter)
    PredictorSpec(tasks=config.tasks, base=base).write(run.folder.adapter / PREDICTOR_FILE)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Run]]:
    """Two runs of the same data and weights, the first not evaluated yet, the second whole."""
    root = tmp_path_factory.mktemp("written")
    write_text_records(root / "in", {"train": 8, "test": 40})
    tiny_base(root / "base")
    with ray_cluster(RayConfig()):
        whole = _made(root, "whole")
        run_stage(whole, "evaluate")
        yield _made(root, "cut"), whole


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_bits(
    runs: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, whole = runs
    advance = Track.advance
    seen: list[int] = []

    def until_the_second(track: Track, count: int, *more: Any) -> None:
        seen.append(count)
        if len(seen) == 2:
            raise _CutOff
        advance(track, count, *more)

    with monkeypatch.context() as patch, pytest.raises(_CutOff):
        patch.setattr(Track, "advance", until_the_second)
        run_stage(cut, "evaluate")
    kept = list(cut.folder.path.glob(".answers_*/*/*.json"))
    assert len(kept) == 2
    run_stage(cut, "evaluate")
    assert not list(cut.folder.path.glob(".answers_*"))
    for slot in ("", "base"):
        mine, theirs = (run.folder.scores(slot) for run in (cut, whole))
        assert mine.scores.read_bytes() == theirs.scores.read_bytes()
        assert mine.features.read_bytes() == theirs.features.read_bytes()
    table = pq.read_table(whole.folder.scores("").scores).to_pandas()
    assert len(table) == 160 and not table.duplicated(["task", "key"]).any()
    assert table.text.notna().sum() == 120


def test_the_report_shows_what_was_asked_and_written(runs: tuple[Run, Run]) -> None:
    _, whole = runs
    run_stage(whole, "report")
    page = whole.folder.page.read_text()
    assert page.count('class="examples"') == 2
    assert "ROUGE-L" in page and "lay on the way" in page and "dark blue" in page


def test_exports_write_the_same_and_the_registered_model_answers_with_texts(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = runs
    run_stage(whole, "export")
    told = json.loads((whole.folder.export("thing") / "task.json").read_text())
    assert told["answer_by"] == "generation" and told["generation"]["num_beams"] == 2
    decision = run_stage(whole, "promote")
    assert decision.verdict == "PROMOTE", decision.reasons
    assert any("export" in reason for reason in decision.reasons), decision.reasons
    samples = list(read_split(whole.config.manifest_path, "test"))[::8]
    rows = [{"task": sample.task, **sample.fields} for sample in samples]
    expected = Predictor.load(whole.folder.adapter).predict(pd.DataFrame(rows))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole.config.tracking.uri)
    registered = mlflow.pyfunc.load_model("models:/writer@champion").predict(pd.DataFrame(rows))
    assert registered["generated_text"].tolist() == expected["generated_text"].tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = partial(Predictor.load, whole.folder.adapter)
    score_files(ScoringJob("writer", load, whole.config.tasks, str(tmp_path / "rows.jsonl"), str(tmp_path / "out")))
    found = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert found["generated_text"].to_pylist() == [None if pd.isna(t) else t for t in expected["generated_text"]]
