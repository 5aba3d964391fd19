"""What the one who waits for a job sees of its log, and what counts as its result."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from jobs.cluster.log_view import LogView, plain
from pipeline.progress import TOKEN, Message, Result, Said, WorkDone, send

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
    with LogView(JOB, None, "elsewhere") as view:
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


FOREIGN = (
    "2026-11-25 21:10:02,637\tWARNING authentication_token_setup.py:85 -- Token authentication is enabled",
    "2026-11-25 21:10:06,320\tINFO job_manager.py:581 -- Runtime env is setting up.",
    "2026/11/25 21:10:31 INFO mlflow.system_metrics.system_metrics_monitor: Skip logging GPU metrics.",
    "\x1b[33m(raylet)\x1b[0m a worker died",
    "a line that no version of a library had before",
)


def test_what_a_job_and_its_workers_say_is_shown_and_no_line_of_a_library(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with LogView(JOB, tmp_path / "job.log", "elsewhere") as view:
        view.show(WORKER + _line(WorkDone("train", 4, 8, "steps", 2.0, 2.0, "loss 0.5"), JOB))
        view.show(WORKER + _line(WorkDone("train", 5, 8), OTHER))
        for line in FOREIGN:
            view.show(line)
        view.show(WORKER + _line(Said("WARNING: a word of the job itself [sic]"), JOB))
        view.ended(3)
    told = capsys.readouterr().err.splitlines()
    shown = "train 4/8 steps (50 %), 2 s spent, 2 s left, loss 0.5"
    assert told == [shown, "WARNING: a word of the job itself [sic]"]
    kept = (tmp_path / "job.log").read_text().splitlines()
    assert (kept[0], kept[2:-1]) == (shown, list(FOREIGN))


@pytest.mark.parametrize(
    ("code", "is_shown"), [(0, False), (2, False), (3, False), (143, False), (1, True), (-9, True)]
)
def test_the_libraries_last_lines_are_shown_of_a_job_that_has_failed(
    code: int, is_shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with LogView(JOB, None, "the command for it") as view:
        view.show("Segmentation fault")
        view.ended(code)
    told = capsys.readouterr().err.splitlines()
    end = f"the job ended with exit code {code}; its whole log: the command for it"
    assert told == (["Segmentation fault", end] if is_shown else [])


def test_a_log_is_read_in_words() -> None:
    assert plain(WORKER + _line(WorkDone("train", 4, 8, "steps", 2.0, 2.0), JOB), JOB).startswith("train 4/8 steps")
    assert plain(_line(Result({"steps": 8}), JOB), JOB) == 'result: {"steps": 8}'
    assert plain(f"{WORKER}anything", JOB) == f"{WORKER}anything"
