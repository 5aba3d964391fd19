"""What a person waits for before the first word: help, refusals and the configuration need nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "mlflow",
    "webdataset",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
)
PROGRAM = """
import json, sys
from jobs.__main__ import main
sys.argv = ["mtl-lora", *sys.argv[1:]]
try:
    main()
    code = 0
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, [name for name in %r if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["retrain", "--help"], 0),
        (["config", "show", "--config", "demo"], 0),
        (["config", "schema"], 0),
        (["prepare", "--config", "demo", "training.max_step=3"], 2),
        (["train", "--config", "demo", "adapter.r=0"], 2),
        (["retrain", "--config", "nowhere.yaml"], 2),
        (["submit", "--address", "http://127.0.0.1:9", "prepare", "--config", "demo", "model.num_layers=x"], 2),
        (["init", "nowhere"], 2),
    ],
)
def test_an_answer_needs_no_heavy_package(tmp_path: Path, arguments: list[str], code: int) -> None:
    command = [sys.executable, "-c", PROGRAM % (HEAVY,), *arguments]
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": root, "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []], done.stderr


@pytest.mark.slow
def test_a_preparation_on_this_machine_alone_imports_neither_ray_nor_deepspeed(tmp_path: Path) -> None:
    rows = [{"text_a": f"message {i}", "label": i % 2} for i in range(60)]
    for split in ("train", "test"):
        path = tmp_path / "spam" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row | {"text_a": f"{split} {row['text_a']}"}) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        "name: t\ndata: {source: records, root: .}\ntasks:\n"
        '  spam: {template: "{text_a}:", label_words: [" no", " yes"]}\n'
    )
    command = [sys.executable, "-c", PROGRAM % (("ray", "deepspeed", "mlflow", "sklearn", "matplotlib"),)]
    done = subprocess.run(
        [*command, "prepare", "--config", "c.yaml"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []], done.stderr
