"""What the one who waits for a job sees of its log, and what counts as its result."""

from __future__ import annotations

import io
import sys

import pytest

from jobs.cluster.log_view import LogView, plain
from pipeline.progress import TOKEN, Message, Result, WorkDone, send

JOB, OTHER = "0123456789abcdef", "fedcba9876543210"
WORKER = "\x1b[36m(RayTrainWorker pid=17, ip=10.0.0.2)\x1b[0m "


@pytest.fixture(autouse=True)
def nobody_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def _line(message: Message, token: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        stream = io.StringIO()
        patch.setattr(sys, "stderr", stream)
        patch.setenv(TOKEN, token)
        send(message)
    return stream.getvalue()


def test_the_result_is_what_the_driver_of_this_job_hands_over() -> None:
    with LogView(JOB) as view:
        for line in (
            _line(Result("of another job"), OTHER),
            WORKER + _line(Result("of a worker"), JOB),
            "mtl-lora-result 1",
            'result: "in words"',
        ):
            view.show(line)
            assert view.result is None, line
        view.show(_line(Result({"steps": 8}), JOB))
    assert view.result == {"steps": 8}


def test_a_worker_tells_how_far_it_is_and_noise_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with LogView(JOB) as view:
        view.show(WORKER + _line(WorkDone("train", 4, 8, "steps", 2.0, 2.0, "loss 0.5"), JOB))
        view.show(WORKER + _line(WorkDone("train", 5, 8), OTHER))
        view.show("Running entrypoint for job raysubmit_1: python")
        view.show("WARNING: a word of the job itself [sic]")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "train 4/8 steps (50 %), 2 s spent, 2 s left, loss 0.5"
    assert OTHER in told[1]  # shown as it is, not taken
    assert told[2:] == ["WARNING: a word of the job itself [sic]"]


def test_a_log_is_read_in_words() -> None:
    assert plain(WORKER + _line(WorkDone("train", 4, 8, "steps", 2.0, 2.0), JOB), JOB).startswith("train 4/8 steps")
    assert plain(_line(Result({"steps": 8}), JOB), JOB) == 'result: {"steps": 8}'
    assert plain(f"{WORKER}anything", JOB) == f"{WORKER}anything"
