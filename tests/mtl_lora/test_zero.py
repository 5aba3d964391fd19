"""Two ranks under DeepSpeed ZeRO train as one process on the joint batch, whichever tasks each rank holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_ranks(timeout_s: int) -> str:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")),
    }
    command = [sys.executable, "-m", "tests.mtl_lora.zero_worker"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    return outputs[0][0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_as_one_process_on_the_joint_batch():
    output = _run_ranks(timeout_s=540)
    results = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("[[")))
    assert len(results) == 23
    for case, difference, moved, is_unseen_task_unchanged in results:
        assert moved > 1e-2, case
        assert difference < 1e-5 * max(1, moved), (case, difference, moved)
        assert is_unseen_task_unchanged, case
