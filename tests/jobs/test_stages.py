"""From an evaluated run to the registry, on one real Ray cluster and one sqlite store: gates, exports, references."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import cli
from jobs.config import RunConfig, load_config
from jobs.main_job import run_stage
from jobs.run import Run
from jobs.scoring import load_untrained, model_of, score
from jobs.stages.compare import compare_any
from jobs.stages.register import identity
from mtl_lora.hashes import write_hashes
from pipeline.contracts import EvaluationReport, PromotionDecision, Sample
from pipeline.errors import HeldBack, InputError
from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.base_model import load_base
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.modeling.scoring import Reply
from pipeline.orchestration.cluster import cluster as ray_cluster
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.scoring import scoring_pool
from pipeline.promotion.registry import Registry
from pipeline.stream import read_split
from tests.jobs.test_cli import Run as Command
from tests.jobs.test_cli import mtl_lora  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LENIENT = (
    "model.num_layers=1",
    "evaluation.num_workers=1",
    "data.synthetic.rows_per_day=24",
    "promotion.gates.beat_base=false",
    "promotion.gates.min_samples=1",
    "promotion.gates.min_rarer_class=1",
    "promotion.gates.gain=none",
    "promotion.gates.margin=1",
)


def _settings(root: Path, name: str, *more: str) -> list[str]:
    return [f"run_root={root}", f"name={name}", *LENIENT, *more]


def _made(root: Path, name: str, seed: int, method: str = "mtl_lora") -> RunConfig:
    """Return an evaluated and exported run whose adapter was not trained but moved at random."""
    config = load_config(Path("demo"), _settings(root, name, f"adapter.method={method}"))
    run = Run(config)
    run.folder.bind(config.digest())
    run_stage(run, "prepare")
    torch.manual_seed(seed)
    adapted: Any = build_adapter(config.adapter, load_base(config.model), [t.name for t in config.tasks])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(config.folder / "adapter")
    PredictorSpec(tasks=config.tasks, base=config.model).write(config.folder / "adapter" / PREDICTOR_FILE)
    run_stage(run, "evaluate")
    run_stage(run, "export")
    return config


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(RayConfig()):
        yield


@pytest.fixture(scope="module")
def runs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    root = tmp_path_factory.mktemp("runs")
    made = {"first": _made(root, "first", 0), "second": _made(root, "second", 1)}
    made["lora"] = _made(root, "lora", 2, "lora")
    assert run_stage(Run(made["first"]), "promote").verdict == "PROMOTE"
    return made


def _scores(config: RunConfig, reference: str) -> Any:
    (found,) = score(Run(config), model_of(Run(config), reference))
    return found.scores()


def _champion(config: RunConfig) -> str:
    return Registry(config.promotion.model_name, config.tracking.uri).version("champion").provenance.run


def test_a_tampered_export_rejects_and_the_champion_stays(
    runs: dict[str, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs["second"]
    task = config.tasks[1].name
    weights = config.folder / "export" / task / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.3 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    write_hashes(weights.parent, weights.name)  # whole files, but of another adapter
    with pytest.raises(HeldBack, match="REJECT"):
        cli.promote(config.write(), None, as_json=True)
    assert json.loads(capsys.readouterr().out)["verdict"] == "REJECT"
    decision = PromotionDecision.read(config.folder / "decision.json")
    assert decision.verdict == "REJECT"
    assert f"'{task}' differs by" in decision.reasons[0]
    assert _champion(config) == "first"
    save_file(tensors, weights, {"format": "pt"})
    write_hashes(weights.parent, weights.name)
    promoted = run_stage(Run(config), "promote")
    assert promoted.verdict == "PROMOTE"
    assert "exports answer as the adapter does" in promoted.reasons[-1]
    assert _champion(config) == "second"
    (config.folder / "decision.json").unlink()  # as if the folder had been removed and trained anew, to the same bits
    assert run_stage(Run(config), "promote").verdict == "PROMOTE"
    assert PromotionDecision.read(config.folder / "decision.json").reasons == (
        f"version {promoted.candidate} of ads-relevance is champion already",
    )


def test_a_version_that_was_rolled_back_is_not_promoted_again(runs: dict[str, RunConfig]) -> None:
    config = runs["second"]
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    assert _champion(config) == "second"
    registry.rollback(why="clicks fell")
    decision = run_stage(Run(config), "promote")
    assert decision.verdict == "HOLD"
    assert "mtl-lora rollback --to" in decision.reasons[0]
    assert _champion(config) == "first"
    registry.rollback(decision.candidate)
    assert _champion(config) == "second"


def test_other_weights_are_another_version(runs: dict[str, RunConfig]) -> None:
    config = runs["first"]
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    weights = config.folder / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert registry.find(identity(Run(config))).provenance.run == "first"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert registry.find(identity(Run(config))) is None
    weights.write_bytes(before)
    other = Registry("another-model", config.tracking.uri)
    assert other.find(identity(Run(config))) is None


def test_promotion_needs_every_export(runs: dict[str, RunConfig]) -> None:
    config = runs["lora"]
    folder = config.folder / "export" / config.tasks[0].name
    folder.rename(folder.with_name("aside"))
    try:
        with pytest.raises(InputError, match="run first: mtl-lora export"):
            run_stage(Run(config), "promote")
    finally:
        folder.with_name("aside").rename(folder)


def test_latency_is_measured_where_a_gate_limits_it(runs: dict[str, RunConfig]) -> None:
    assert EvaluationReport.read(runs["first"].folder / "evaluation.json").latency_ms is None
    settings = _settings(runs["first"].run_root, "first", "promotion.gates.max_latency_ms=0.001")
    found = run_stage(Run(load_config(Path("demo"), settings)), "evaluate")
    trained, base = found.trained, found.base
    assert trained.latency_ms is not None
    assert 0.1 < trained.latency_ms < 10_000
    assert base.latency_ms is None
    assert run_stage(Run(load_config(Path("demo"), settings)), "evaluate") == found  # measured once, it stands


def test_any_two_models_compare(runs: dict[str, RunConfig]) -> None:
    config, task = runs["first"], runs["first"].tasks[0].name
    ours = _scores(config, "run:first")
    assert compare_any(Run(config), "run:first", "1").macro.difference == 0.0  # version 1 is this run
    assert compare_any(Run(config), "models:/ads-relevance/1", "run:first").macro.difference == 0.0
    against_base = compare_any(Run(config), None, "base")
    turned = compare_any(Run(config), "base", "run:first")
    assert turned.macro.difference == pytest.approx(-against_base.macro.difference)
    exported = compare_any(Run(config), f"export/{task}", "run:first")
    assert list(exported.tasks) == [task]
    assert set(exported.only_one) == {t.name for t in config.tasks[1:]}
    alone = _scores(config, f"export/{task}")
    expected = ours[ours.task == task].set_index("key").loc[alone.key]
    np.testing.assert_allclose(np.stack(alone.scores), np.stack(expected.scores), atol=1e-4)


def test_a_base_without_adapter_answers_as_one_that_is_switched_off(runs: dict[str, RunConfig]) -> None:
    config, task = runs["first"], runs["first"].tasks[0].name
    off = _scores(config, "base")
    off = off[off.task == task]
    samples = list(read_split(config.manifest_path, "test", task=task))
    plain = load_untrained(config)["base"].probabilities(samples)
    assert list(off.key) == [sample.key for sample in samples]
    np.testing.assert_allclose(np.stack(plain), np.stack(off.scores), atol=1e-4)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("run:frist", "did you mean 'first'"),
        ("models:/ads-relevance@nobody", "must be a number or alias"),
        ("99", "must be a number or alias"),
        ("some/where", "must be named as base, run:NAME"),
    ],
)
def test_an_unknown_model_is_refused_with_what_there_is(runs: dict[str, RunConfig], reference: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compare_any(Run(runs["first"]), reference, "base")


def test_an_export_of_another_cut_of_the_base_is_refused(runs: dict[str, RunConfig]) -> None:
    from pipeline.evaluation.parity import exported_scorer

    config = runs["first"]
    deeper = config.model.model_copy(update={"num_layers": 2})
    spec = PredictorSpec(tasks=config.tasks[:1], base=deeper)
    with pytest.raises(InputError, match="places without a tensor"):
        exported_scorer(config.folder / "export" / config.tasks[0].name, spec)


def test_report_shows_the_adapter_inside_and_lora_beside_it(runs: dict[str, RunConfig]) -> None:
    config = runs["first"]
    text = run_stage(Run(config), "report").read_text()
    for words in ("Which up-projection serves which task", "Λ are", "Untrained base · silhouette", "MTL-LoRA, trained"):
        assert words in text
    for words in ("evaluation.lora_run", "Paired differences", "manifest sha256", "because"):
        assert words in text
    beside = load_config(Path("demo"), _settings(config.run_root, "first", "evaluation.lora_run=lora"))
    text = run_stage(Run(beside), "report").read_text()
    assert "LoRA, run lora" in text
    assert "MTL-LoRA, this run" in text
    missing = load_config(Path("demo"), _settings(config.run_root, "first", "evaluation.lora_run=none"))
    with pytest.raises(InputError, match=r"run first: mtl-lora evaluate, in the run none"):
        run_stage(Run(missing), "report")


def test_verbs_answer_in_json(runs: dict[str, RunConfig], mtl_lora: Command) -> None:  # noqa: F811
    root = runs["first"].run_root
    ending = ["--json", *_settings(root, "first")]
    registry = Registry("ads-relevance", runs["first"].tracking.uri)
    for number in (1, 2):
        if registry.version("champion").number != number:
            registry.rollback(number)
    done = mtl_lora("rollback", "--config", "demo", "--why", "clicks fell", *ending)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"model": "ads-relevance", "champion": 1, "instead_of": 2}
    done = mtl_lora("lineage", "--config", "demo", *ending)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert (rows["version"], rows["run"], rows["because"]) == (1, "first", "clicks fell")
    assert len(rows["manifest_sha256"]) == 64
    done = mtl_lora("compare", "--config", "demo", "--reference", "base", *ending)
    assert done.code == 0, done.err
    assert json.loads(done.out)["reference"] == "untrained base"
    done = mtl_lora("rollback", "--config", "demo", "--to", "77", *ending)
    assert done.code == 2
    assert "are registered" in done.err


class _Slow:
    """Answers with what names the sample; leaves a line a call, and takes its time over it."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def evaluated(self, samples: Sequence[Sample]) -> list[tuple[Reply, Any]]:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {len(samples)}\n")
        time.sleep(0.25)
        return [(Reply(np.array([float(s.key), 1 - float(s.key)])), np.array([float(s.key)])) for s in samples]


def _load(log: Path) -> dict[str, Any]:
    return {"trained": _Slow(log)}


def _kill_the_busiest(log: Path, killed: list[int]) -> None:
    while len(lines := log.read_text().splitlines() if log.is_file() else []) < 4:
        time.sleep(0.05)
    killed.append(int(lines[-1].split()[0]))
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_worker_killed_in_the_middle_leaves_each_sample_scored_once(
    cluster: None, tmp_path: Path, workers: int
) -> None:
    counts = {"one": 1, "few": 63, "many": 700}  # tasks as uneven as their shards
    samples = [
        Sample(key=f"0.{i:06d}", task=task, fields={"text": "x" * (i % 50)}, label=0)
        for task, count in counts.items()
        for i in range(count)
    ]
    log, killed, done = tmp_path / "calls", [], []
    killer = threading.Thread(target=_kill_the_busiest, args=(log, killed), daemon=True)
    killer.start()
    with scoring_pool(partial(_load, log), workers) as pool:
        found = pool.score(samples, on_progress=done.append, states_of={("many", samples[-1].key)})
        pids = {int(line.split()[0]) for line in log.read_text().splitlines()}
        assert len(pids) == workers + 1  # the killed one was replaced
    killer.join()
    assert killed
    assert [row[0] for row in found.probabilities] == [float(s.key) for s in samples]
    assert sum(done) == len(samples)
    assert list(found.states) == [("many", samples[-1].key)]
