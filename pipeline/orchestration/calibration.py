"""The calibration, in a process of its own with the threads and the imports of a rank: what it holds counts too."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob
    from pipeline.training.planner import Calibration

_PROGRAM = "import pipeline.orchestration.training, pipeline.training.calibration as c; c.main()"


def calibrate(job: TrainingJob, in_process: bool = False) -> Calibration:
    """Measure on this machine how fast a rank computes and what memory it takes.

    Args:
        job: to be measured.
        in_process: in this process, which trains the job itself; its memory is then more than the job's.

    Raises:
        InputError: the model cannot be run here.
    """
    from pipeline.training.planner import Calibration

    if in_process:
        from pipeline.training.calibration import measure

        return measure(job)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray gives a worker of one CPU
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=pickle.dumps(job),
        env=environment,
        capture_output=True,
        timeout=1800,
    )
    if done.returncode:
        raise InputError(
            f"the calibration must run the model, it failed: {done.stderr.decode()[-600:]}; "
            "fix that, or plan with --no-calibrate"
        )
    return Calibration.model_validate_json(done.stdout.splitlines()[-1])
