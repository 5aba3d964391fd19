"""Lines for a collector of logs: each is one JSON object, says whose it is, and has no secret."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.cluster.log_view import LogView, plain
from jobs.cluster.submission import _environment
from pipeline.errors import masked
from pipeline.log_lines import LOG_FORMAT, name_process, without_secrets
from pipeline.orchestration.environment import of_workers, submission_id
from pipeline.progress import TOKEN, Message, Result, Said, WorkDone, received, send
from pipeline.tracking import TrackingConfig
from tests.jobs.test_cli import Run, mtl_lora  # noqa: F401 - a fixture
from tests.pipeline.test_progress import VALUES, WORK

JOB = "0123456789abcdef"
WORKER = "\x1b[36m(RayTrainWorker pid=17, ip=10.0.0.2)\x1b[0m "
SECRET = "hunter2hunter2"


def parsed(line: str) -> dict[str, Any]:
    """Parse as strictly as any collector does."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    found = json.loads(line, parse_constant=refuse)
    assert isinstance(found, dict)
    assert found["time"].endswith("+00:00")
    assert found["level"] in ("INFO", "WARNING", "ERROR")
    assert isinstance(found["message"], str)
    return found


def _line(message: Message, token: str = JOB, **variables: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        stream = io.StringIO()
        patch.setattr(sys, "stderr", stream)
        for name, value in {TOKEN: token, LOG_FORMAT: "json", **variables}.items():
            patch.setenv(name, value)
        send(message)
    line, end = stream.getvalue().split("\n")
    assert end == ""
    return line


@given(WORK | st.builds(Result, VALUES) | st.builds(Said, st.text()))
def test_a_message_comes_back_from_its_record_but_for_secrets(message: Message) -> None:
    line = _line(message)
    parsed(line)
    wanted = type(message)(**{name: without_secrets(value) for name, value in vars(message).items()})
    assert received(line, JOB) == wanted
    assert received(line, "fedcba9876543210") is received(line, "") is received(f"x{line}", JOB) is None


def test_progress_is_fields_and_every_line_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN", "JOB", "RANK"):  # what is set below is unset in the end
        monkeypatch.setenv(f"MTL_LORA_LOG_{name}", "")
    assert not {"run", "job", "rank"} & parsed(_line(Said("nobody's"))).keys()
    name_process(run="ads", job="mtl-lora-train-ads", rank=0)
    found = parsed(_line(WorkDone("train", 4, 8, "steps", 2.0, 3.5, "loss 0.5"), ""))
    assert {name: found[name] for name in ("done", "total", "unit", "seconds_left")} == {
        "done": 4,
        "total": 8,
        "unit": "steps",
        "seconds_left": 3.5,
    }
    assert (found["run"], found["job"], found["rank"]) == ("ads", "mtl-lora-train-ads", 0)
    assert parsed(_line(Said("WARNING: a disk is full")))["level"] == "WARNING"
    assert parsed(_line(Said("error: a rule")))["level"] == "ERROR"


@pytest.mark.parametrize(
    "message",
    [
        Said(f"postgresql://ads:{SECRET}@db failed"),
        WorkDone("read", 1, 2, note=f"https://{SECRET}@host"),
        Result({"uri": f"https://a:b'{SECRET}@db", "mail": "a@b", "other": [SECRET]}),
    ],
)
def test_a_secret_stands_in_no_line(message: Message) -> None:
    line = _line(message, HF_TOKEN=SECRET)
    assert SECRET not in line
    parsed(line)
    assert type(received(line, JOB)) is type(message)


def test_a_setting_of_tokenizers_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert masked("true or false") == "true or false"


CODE = f"""
import logging, sys, warnings
from pipeline.log_lines import name_process, record_lines
from pipeline.progress import Track, say, tell

name_process(run="ads")
with record_lines(also_output=False):
    say("[bold]12[/bold] shards"); tell("error: a\\n  b")
    with Track("read", 1) as track: track.advance()
    warnings.warn("careful", stacklevel=1)
    logging.getLogger("pipeline.serving.server").warning("a model was lost: %s", "why")
    logging.getLogger("a.library").warning("a library's %s", "words")
    print("a library's", file=sys.stderr)
    print({WORKER!r} + "a worker's library", file=sys.stderr)
    sys.stderr.write("no end")
    print("the result")
"""


@pytest.mark.parametrize("token", ["", JOB])
def test_all_that_a_process_says_is_records_and_its_output_stays_as_it_is(token: str) -> None:
    environment = {**os.environ, TOKEN: token, LOG_FORMAT: "json"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "the result\n", done.stderr
    found = [parsed(line) for line in done.stderr.splitlines()]
    assert {record["run"] for record in found} == {"ads"}
    texts = [record["message"] for record in found]
    assert texts[:2] == ["12 shards", "error: a\n  b"]
    assert texts[5:] == ["a library's words", "a library's", "a worker's library", "no end"]
    assert found[7]["worker"] == "RayTrainWorker pid=17, ip=10.0.0.2"
    assert "careful" in texts[3]
    assert (found[4]["message"], found[4]["level"]) == ("a model was lost: why", "WARNING")
    own = [received(line, token) is not None for line in done.stderr.splitlines()]
    assert own == [bool(token)] * 3 + [False] * 6  # what follows the job shows its own words alone


PASSING = """
import sys
from pipeline.log_lines import record_lines

with record_lines(also_output=True):
    for line in sys.stdin: print(line, end="")
"""


def test_a_driver_passes_its_workers_records_on_and_no_result_of_theirs() -> None:
    rank = _line(WorkDone("train", 4, 8), MTL_LORA_LOG_RANK="1")
    result, library = _line(Result("a worker's")), "\x1b[36m(pid=17)\x1b[0m anything"
    done = subprocess.run(
        [sys.executable, "-c", PASSING],
        env={**os.environ, LOG_FORMAT: "json"},
        input="".join(f"{line}\n" for line in (WORKER + rank, WORKER + result, library)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, second, third = done.stdout.splitlines()
    assert first == rank
    assert parsed(second)["message"] == 'result: "a worker\'s"'
    assert received(second, JOB) is None
    assert (parsed(third)["message"], parsed(third)["worker"]) == ("anything", "pid=17")


def test_who_follows_a_job_passes_its_records_on_or_reads_them_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    lines = [
        _line(WorkDone("train", 4, 8), MTL_LORA_LOG_RANK="1", MTL_LORA_LOG_JOB="its-id"),
        _line(Said("a word")),
        f"@mtl-lora {JOB} " + json.dumps({"kind": "said", "text": "of a job that writes plain text"}),
        _line(Result({"steps": 8})),
        "Segmentation fault",
    ]
    for log_format in ("json", "text"):
        monkeypatch.setenv(LOG_FORMAT, log_format)
        with LogView(JOB, None, "elsewhere") as view:
            for line in lines:
                view.show(line)
            view.ended(1)
        assert view.result == {"steps": 8}
        told = capsys.readouterr().err.splitlines()
        words = ["train 4/8 (50 %), 0 s spent", "a word", "of a job that writes plain text", "Segmentation fault"]
        if log_format == "json":
            found = [parsed(line) for line in told]
            assert (found[0]["done"], found[0]["rank"], found[0]["job"]) == (4, 1, "its-id")
            assert all("token" not in record for record in found)
            told = [record["message"] for record in found]
        assert told[:-1] == words
        assert (plain(lines[1], JOB) == "a word") == (log_format == "text")


def test_the_format_travels_to_jobs_and_on_to_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    assert LOG_FORMAT not in _environment(TrackingConfig(), ())
    assert of_workers() == {}
    monkeypatch.setenv(LOG_FORMAT, "json")
    monkeypatch.setenv("MTL_LORA_LOG_RUN", "ads")
    brought = _environment(TrackingConfig(), ())
    assert brought[LOG_FORMAT] == "json"
    assert of_workers() == {LOG_FORMAT: "json", "MTL_LORA_LOG_RUN": "ads"}
    job = {"metadata": {"job_submission_id": "its-id"}, "runtime_env": {"env_vars": brought}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert submission_id() == "its-id"
    assert of_workers() == {"MTL_LORA_LOG_RUN": "ads"}  # Ray refuses what both name


def test_a_format_that_is_none_ends_with_2(mtl_lora: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv(LOG_FORMAT, "xml")
    done = mtl_lora("config", "schema")
    assert done.code == 2
    assert "must be text or json, got 'xml'" in done.err
