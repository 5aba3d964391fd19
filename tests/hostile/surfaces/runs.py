"""Surfaces of a run: its configuration, adapter, checkpoints, folder and gates."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

from pipeline.contracts import Comparison, EvaluationReport
from tests.hostile.drive import Put
from tests.hostile.mutations import VALUES, as_json, mutated_bytes, mutated_value
from tests.hostile.surfaces.records import TASKS


def configuration(folder: Path) -> Put:
    """Files of settings, by their values and by their text, and overrides."""
    import yaml

    from jobs.config import load_config
    from jobs.config_file import PACKAGED

    names = sorted(PACKAGED.glob("*.yaml"))
    texts = [name.read_text() for name in names if name.stat().st_size < 3000]
    overrides = ("training.max_steps=5", "data.root=x", "tasks.a.template={x}", "seed=", "=1", "a.b.c=[1", "name=../x")

    def put(rng: random.Random) -> bool:
        text = rng.choice(texts)
        if rng.random() < 0.7:
            data = yaml.safe_dump(mutated_value(rng, yaml.safe_load(text)), allow_unicode=True).encode(
                "utf-8", "replace"
            )
        else:
            data = mutated_bytes(rng, text.encode())
        path = folder / "run.yaml"
        path.write_bytes(data)
        load_config(path, [*(rng.choice(overrides) for _ in range(rng.choice((0, 0, 1)))), f"run_root={folder}/runs"])
        return True

    return put


def adapter(folder: Path) -> Put:
    """An adapter's folder, with its hashes and without, as training, serving and exports read it."""
    import torch
    from torch import nn

    from mtl_lora import MTLLoRAConfig, MTLLoRAModel
    from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE
    from mtl_lora.hashes import HASHES_FILE
    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2))

    made, tried = folder / "made", folder / "tried"
    model = MTLLoRAModel(base(), MTLLoRAConfig(["a", "b"], r=1, target_modules=["0"]))
    model.save_pretrained(made)
    PredictorSpec(tasks=TASKS[:2], base=BaseModelConfig(num_layers=2)).write(made / PREDICTOR_FILE)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    names = (CONFIG_FILE, WEIGHTS_FILE, PREDICTOR_FILE, HASHES_FILE)
    tried.mkdir()

    def put(rng: random.Random) -> bool:
        name, has_hashes = rng.choice(names), rng.random() < 0.2
        changed = mutated_bytes(rng, files[name])
        if name.endswith(".json") and rng.random() < 0.7:
            changed = as_json(rng, mutated_value(rng, json.loads(files[name])))
        elif name == WEIGHTS_FILE and rng.random() < 0.7:
            length = int.from_bytes(files[name][:8], "little")
            header = as_json(rng, mutated_value(rng, json.loads(files[name][8 : 8 + length])))
            changed = len(header).to_bytes(8, "little") + header + files[name][8 + length :]
        for each, data in files.items():
            (tried / each).unlink(missing_ok=True)
            if each != HASHES_FILE or has_hashes or name == HASHES_FILE:
                (tried / each).write_bytes(changed if each == name else data)
        PredictorSpec.read(tried / PREDICTOR_FILE)
        MTLLoRAModel.from_pretrained(base(), tried)
        return True

    return put


def checkpoint(folder: Path) -> Put:
    """A checkpoint's folder, as training goes on from it."""
    import torch

    from pipeline.training.checkpoint import Checkpoints, read_checkpoint

    sha256 = "a" * 64
    made, tried = folder / "made", folder / "tried"

    def weights(place: Path) -> None:
        place.mkdir(parents=True)
        (place / "adapter_model.safetensors").write_bytes(b"weights")

    step = Checkpoints(made, sha256).save(
        5, {"weight/x": torch.ones(2, 3)}, {"step": 5}, weights, num_ranks=1, zero_stage=1, best=True
    )
    files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    manifest = json.loads((step / "manifest.json").read_text())
    strange = [*VALUES, "../../../etc/passwd", "/etc/passwd", "b" * 64]

    def put(rng: random.Random) -> bool:
        shutil.rmtree(tried, ignore_errors=True)
        name = rng.choice(list(files))
        changed = {**files, name: mutated_bytes(rng, files[name])}
        told = json.loads(json.dumps(manifest))
        if rng.random() < 0.6:  # its hash told anew: what is read then is what was changed
            inner = name.partition("/")[2]
            if inner in told["files"]:
                told["files"][inner] = hashlib.sha256(changed[name]).hexdigest()
                changed[f"{step.name}/manifest.json"] = json.dumps(told).encode()
            elif inner:
                changed[name] = as_json(rng, mutated_value(rng, told, strange))
        for each, data in changed.items():
            (tried / each).parent.mkdir(parents=True, exist_ok=True)
            (tried / each).write_bytes(data)
        kept = Checkpoints(tried, sha256)
        kept.refuse_foreign()
        kept.best()
        newest = kept.newest()
        if newest is None:
            return False
        read_checkpoint(newest)
        return True

    return put


def run_folder(folder: Path) -> Put:
    """What a run's folder holds beside its artefacts: its binding, its history, its reports."""
    from jobs.run_folder import BASE_EVALUATION, DECISION, EVALUATION, RunFolder
    from pipeline.tracking import read_history

    run = RunFolder(folder / "run")
    run.path.mkdir()
    report, comparison = _evaluated()
    decision = _decided(report, comparison)
    known = {
        "run.json": {"schema": 1, "config_sha256": "a" * 64, "mlflow_uri": "sqlite:///x", "mlflow_run_id": "b" * 32},
        "history.jsonl": {"step": 10, "loss": 0.5, "task_loss": {"a": 1.0}, "time_ms": 1},
        EVALUATION.name: report.model_dump(mode="json", by_alias=True),
        BASE_EVALUATION.name: report.model_dump(mode="json", by_alias=True),
        DECISION.name: decision.model_dump(mode="json", by_alias=True),
    }

    def put(rng: random.Random) -> bool:
        name = rng.choice(list(known))
        for each, value in known.items():
            data = as_json(rng, mutated_value(rng, value)) if each == name else json.dumps(value).encode()
            (run.path / each).write_bytes(data + b"\n")
        run.check_configuration("a" * 64)
        for row in read_history(run.history):
            assert isinstance(row["step"], int)
        for file in (EVALUATION, BASE_EVALUATION, DECISION):
            run.find(file)
        return True

    return put


def _evaluated() -> tuple[EvaluationReport, Comparison]:
    from pipeline.evaluation.compare import compare
    from pipeline.evaluation.summary import summarize
    from tests.pipeline.evaluation.simulated import scores, specs

    frame = scores(0.8, seed=1)
    data = {"manifest_sha256": "a" * 64, "split": "test"}
    report = summarize(frame, specs(), model="c", data=data, replicates=50)
    paired = compare(
        frame, scores(0.9, seed=1), specs(), candidate_name="c", reference_name="7", data=data, replicates=50
    )
    return report, paired


def _decided(report: EvaluationReport, comparison: Comparison, gates: Any = None) -> Any:
    from pipeline.promotion.evidence import Evidence, Opponent
    from pipeline.promotion.gates import GatesConfig
    from pipeline.promotion.policy import decide

    opponent = Opponent("7", report, comparison)
    return decide(report, Evidence(Opponent("base", report, comparison), opponent), gates or GatesConfig())


def gates(folder: Path) -> Put:
    """Reports, comparisons and limits: what is decided rests on finite numbers or holds."""
    from jobs.config import load_config

    report, comparison = _evaluated()
    files = {
        "evaluation.json": report.model_dump(mode="json", by_alias=True),
        "comparison.json": comparison.model_dump(mode="json", by_alias=True),
    }
    limits = {"margin": 0.01, "max_ece": 0.1, "calibration_ratio": [0.8, 1.25], "margins": {"a": 0.1}, "min_samples": 5}
    task = {"template": "{text}", "label_words": [" no", " yes"]}
    numbers = [*VALUES, -0.5, 2, 1e-9, float("nan"), float("inf"), "0.1", [0, 1], [1.25, 0.8], {"a": float("nan")}]

    def put(rng: random.Random) -> bool:
        which = rng.choice(("evaluation.json", "comparison.json", "evaluation.json", "gates"))
        configured = None
        if which == "gates" and rng.random() < 0.5:
            values = {
                "name": "x",
                "data": {"source": "records", "root": "."},
                "tasks": {"a": task},
                "promotion": {"gates": mutated_value(rng, limits, numbers)},
            }
            (folder / "run.yaml").write_bytes(as_json(rng, values))
            configured = load_config(folder / "run.yaml", [f"run_root={folder}/runs"]).promotion.gates
        for name, value in files.items():
            data = as_json(rng, mutated_value(rng, value, numbers)) if name == which else json.dumps(value).encode()
            (folder / name).write_bytes(data)
        found = EvaluationReport.read(folder / "evaluation.json")
        paired = Comparison.read(folder / "comparison.json")
        decision = _decided(found, paired, configured)
        return bool(decision.reasons)

    return put
