"""The contracts of imports fail where one breaks: a forbidden import in a copy of the code, one for each rule."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = [
    c["name"] for c in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
LAZY = "def _lazily():\n    "
BREAKS = [
    # the words that the broken contract's name begins with, the module, the line that is added to it
    ("mtl_lora is a pure torch library", "mtl_lora/layer.py", "import ray"),
    ("mtl_lora is a pure torch library", "mtl_lora/export.py", "import pipeline.errors"),
    ("only jobs knows the order", "pipeline/stream/plan.py", "import jobs.config"),
    ("mtl_lora: the core below", "mtl_lora/config.py", f"{LAZY}import mtl_lora.model"),
    ("no circles", "pipeline/stream/order.py", f"{TYPES}import pipeline.stream.stream"),
    ("no circles", "jobs/run.py", f"{LAZY}import jobs.main_job"),
    ("no circles", "mtl_lora/layer.py", f"{TYPES}from mtl_lora.model import MTLLoRAModel"),
    ("the way of the data", "pipeline/contracts.py", "import pipeline.progress"),
    ("the way of the data", "pipeline/stream/plan.py", "import pipeline.ingestion.shards"),
    ("the way of the data", "pipeline/evaluation/metrics.py", f"{TYPES}import pipeline.training.loop"),
    ("the way of the data", "pipeline/training/loop.py", f"{LAZY}import pipeline.orchestration.config"),
    ("the way of the data", "pipeline/newcomer.py", "import pipeline.errors"),
    ("ingestion meets the synthetic data", "pipeline/ingestion/scan.py", "import pipeline.synthetic.ads"),
    ("Ray has one door for jobs", "pipeline/training/loop.py", f"{LAZY}import ray.train"),
    ("Ray has one door for jobs", "jobs/scoring.py", f"{TYPES}from ray.util import ActorPool"),
    (
        "what names a cluster imports no Ray",
        "pipeline/orchestration/config.py",
        "import pipeline.orchestration.mapping",
    ),
    ("DeepSpeed has one door", "pipeline/training/checkpoint.py", "from deepspeed import utils"),
    ("MLflow has a door", "jobs/stages/register.py", f"{LAZY}from mlflow import MlflowClient"),
    ("webdataset has one door", "pipeline/stream/reader.py", "import webdataset"),
    ("PEFT is asked", "pipeline/modeling/adapter.py", f"{LAZY}import peft"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("mtl_lora", "pipeline", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _lint(folder: Path) -> tuple[int, list[str]]:
    """Return the exit code of what ``make check`` runs, and the names of the contracts that it finds broken."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env={"COLUMNS": "200"})
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "Analyzed" in done.stdout, done.stdout + done.stderr
    return done.returncode, [line.removesuffix(" BROKEN") for line in lines if line.endswith(" BROKEN")]


def test_make_check_asks_for_the_contracts() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    assert "lint-imports" in recipe


def test_the_contracts_hold(copy: Path) -> None:
    assert _lint(copy) == (0, [])


def test_each_contract_is_broken_below() -> None:
    assert [name for name in CONTRACTS if not any(name.startswith(words) for words, _, _ in BREAKS)] == []


@pytest.mark.parametrize(("words", "module", "line"), BREAKS)
def test_a_forbidden_import_is_found(copy: Path, words: str, module: str, line: str) -> None:
    path = copy / module
    before = path.read_text() if path.is_file() else None
    try:
        path.write_text(f"{before or ''}\n{line}\n")
        code, broken = _lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert code == 1
    assert any(name.startswith(words) for name in broken), broken
