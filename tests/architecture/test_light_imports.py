"""Configurations are read without the frameworks, and Ray finds its variables set when it is imported."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.orchestration

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "torch", "mlflow", "deepspeed", "transformers")
MODULES = sorted(m.name for m in pkgutil.iter_modules(pipeline.orchestration.__path__))


@pytest.mark.parametrize("module", ["pipeline.orchestration.config", "pipeline.synthetic.config", "pipeline.progress"])
def test_a_configuration_needs_no_framework(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "needless"),
    [("pipeline.orchestration.training", "transformers"), ("pipeline.training.loop", "mlflow")],
    ids=["controller", "rank"],
)
def test_what_starts_with_training_loads_nothing_that_it_does_not_use(module: str, needless: str) -> None:
    code = f"import sys, {module}; print({needless!r} in sys.modules); import {needless}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


BEFORE_RAY = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ray":
            print(os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"), os.environ.get("RAY_JOB_STOP_WAIT_TIME_S"))
            raise SystemExit

sys.meta_path.insert(0, Watch())
import pipeline.orchestration.%s
print("no ray")
"""


@pytest.mark.parametrize("module", MODULES)
def test_the_variables_of_ray_stand_before_ray_is_imported(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", BEFORE_RAY % module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout in ("no ray\n", "0.2 120\n")  # some import it only when they are asked
