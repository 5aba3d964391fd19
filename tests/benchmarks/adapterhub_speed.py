"""Is a training step faster than with AdapterHub's MTL-LoRA, which splits the batch by task?"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timing import hardware, milliseconds, ratio, row

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".cache" / "adapterhub"
PACKAGES = ["adapters==1.3.0", "transformers==4.57.6", "huggingface_hub<1", "tokenizers>=0.22,<0.23"]


def _interpreter() -> Path:
    """Return AdapterHub's own Python, made at the first call; torch and the rest come from this environment."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / ".complete"
    if not done.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return python


def run() -> dict[str, Any]:
    """Time both in AdapterHub's environment, on one thread and on all."""
    python = _interpreter()
    rows, versions = [], {"python": sys.version.split()[0]}
    for count in sorted({1, torch.get_num_threads()}):
        command = [str(python), "-m", "tests.benchmarks.adapterhub_worker", str(count)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if result.returncode:
            raise RuntimeError(f"AdapterHub's side must run, got {result.stderr[-800:]}")
        answer = json.loads(result.stdout.splitlines()[-1])
        versions |= answer["versions"]
        value = ratio(answer["seconds"], "mtl_lora", "adapterhub")
        measure = f"training step of 2 layers, 16x32 tokens, {count} thread(s): over AdapterHub"
        rows.append(row(measure, "< 1.00", value, value < 1, median_ms=milliseconds(answer["seconds"])))
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks adapterhub_speed",
        "hardware": hardware(),
        "versions": versions,
        "protocol": "fp32, q, k, v, r = 8, n = 3, diagonal, 8 tasks, dropout 0.05; turns, 20 rounds, medians",
        "rows": rows,
    }
