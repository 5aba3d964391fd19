"""What is trained in a process leaves nothing behind in it: a study trains hundreds of models in one."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORKER = """
import gc
import sys
import weakref

import torch
from torch import nn

from pipeline.training.config import TrainingConfig
from pipeline.training.engine import Engine, be_the_only_rank, join_process_group

be_the_only_rank()
join_process_group()
module = nn.Sequential(nn.Linear(3, 2))
engine = Engine(module, TrainingConfig(num_workers=1, zero_stage=int(sys.argv[1])), 2, False)
engine.backward(engine(torch.ones(4, 3)).sum(), is_last=True)
engine.step()
gone = weakref.ref(module)
engine.close()
del engine, module
gc.collect()
assert gone() is None, "the module is held"
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_closed_engine_lets_go_of_its_module(stage: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(stage)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
