from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.cli import main

VERBS = ["plan", "prepare", "train", "evaluate", "compare", "export", "promote", "rollback", "lineage", "report"]
VERBS += ["retrain", "tune", "bench", "doctor", "demo", "submit", "schedule", "status", "logs", "stop", "list"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def mtl_lora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "140")  # whatever ran before in this process may have left another width

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["mtl-lora", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    return run


Run = Callable[..., Done]


def _configuration(folder: Path, rows: list[dict[str, object]], words: str = '[" no", " yes"]') -> Path:
    for split in ("train", "test"):
        path = folder / "data" / "spam" / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            lines = [row | {"id": f"{split}-{i}", "text_a": f"{split} {row['text_a']}"} for i, row in enumerate(rows)]
            file.writelines(json.dumps(line) + "\n" for line in lines)
    path = folder / "run.yaml"
    path.write_text(
        f"name: t\nrun_root: {folder}/runs\ndata: {{source: records, root: {folder}/data}}\n"
        f'tasks:\n  spam:\n    template: "Message: {{text_a}} Spam:"\n    label_words: {words}\n'
    )
    return path


ROWS: list[dict[str, object]] = [{"text_a": f"message number {i}", "label": i % 2} for i in range(8)]


def test_every_verb_explains_itself(mtl_lora: Run) -> None:
    listed = mtl_lora("--help")
    assert listed.code == 0
    for verb in VERBS:
        assert verb in listed.out


def test_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys, jobs.cli; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_unknown_verb_and_option_are_bad_usage(mtl_lora: Run) -> None:
    assert mtl_lora("trian").code == 2
    assert mtl_lora("train", "--confg", "demo").code == 2


def test_prepare_prints_one_json_document_last(mtl_lora: Run, tmp_path: Path) -> None:
    done = mtl_lora("prepare", "--config", _configuration(tmp_path, ROWS), "--json")
    assert done.code == 0, done.err
    manifest = json.loads(done.out)
    assert sum(shard["samples"] for shard in manifest["shards"]) == 16
    assert (tmp_path / "runs" / "t" / "config.yaml").is_file()


def test_passwords_in_errors_are_not_printed(mtl_lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("API request to http://ads:hunter2@host/api failed")

    monkeypatch.setattr("jobs.main_job.run_stage", away)
    done = mtl_lora("prepare", "--config", _configuration(tmp_path, ROWS))
    assert done.code == 1
    assert "Traceback" in done.err
    assert "http://ads:***@host/api" in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize("secret", ["TOKEN=hunter2", "hunter2-", "", "A\n"])
def test_a_secret_is_named_and_its_value_refused_unsaid(mtl_lora: Run, tmp_path: Path, secret: str) -> None:
    there = ("submit", "--address", "http://127.0.0.1:9", "--secret", secret)
    done = mtl_lora(*there, "prepare", "--config", _configuration(tmp_path, ROWS))
    assert done.code == 2
    assert "--secret must be the name of a variable" in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_missing_input_ends_with_2_and_the_remedy(mtl_lora: Run, tmp_path: Path, verb: str) -> None:
    path = _configuration(tmp_path, ROWS)
    (tmp_path / "data" / "spam" / "train.jsonl.gz").unlink()
    (tmp_path / "data" / "spam" / "test.jsonl.gz").unlink()
    done = mtl_lora(verb, "--config", path)
    assert done.code == 2, done.err
    assert "spam" in done.err
    assert not (tmp_path / "runs" / "t" / "adapter").exists()


def test_unknown_task_in_the_data_ends_with_2(mtl_lora: Run, tmp_path: Path) -> None:
    done = mtl_lora(
        "prepare", "--config", _configuration(tmp_path, [*ROWS, {"text_a": "x", "label": 0, "task": "ham"}])
    )
    assert done.code == 2, done.err
    assert "ham" in done.err
    assert "spam" in done.err


def test_base_model_folder_that_is_none_ends_with_2(mtl_lora: Run, tmp_path: Path) -> None:
    done = mtl_lora("train", "--config", _configuration(tmp_path, ROWS), f"model.base={tmp_path}/data")
    assert done.code == 2, done.err
    assert "model.base must be" in done.err


def test_label_word_that_merges_with_the_prompt_ends_with_2(mtl_lora: Run, tmp_path: Path) -> None:
    path = _configuration(tmp_path, ROWS)
    path.write_text(path.read_text().replace("Spam:", "no").replace('" no"', '"s"'))
    done = mtl_lora("prepare", "--config", path)
    assert done.code == 2, done.err
    assert "must stand alone after the prompt" in done.err


def test_batch_that_the_ranks_do_not_divide_ends_with_2(mtl_lora: Run, tmp_path: Path) -> None:
    done = mtl_lora("train", "--config", _configuration(tmp_path, ROWS), "training.global_batch_size=7")
    assert done.code == 2, done.err
    assert "got 7; choose" in done.err


def test_evaluate_before_training_ends_with_2(mtl_lora: Run, tmp_path: Path) -> None:
    path = _configuration(tmp_path, ROWS)
    for verb in ("export", "promote", "report"):
        done = mtl_lora(verb, "--config", path)
        assert done.code == 2, done.err
        assert "run first: mtl-lora" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backfill", "2026-02-02", "2026-01-05"], "must run forwards"),
        (["--backfill", "2026-01-05", "2026-02-02", "--dry-run"], "leave one of them out"),
        (["--backfill", "2026-01-05", "2026-02-02", "--as-of", "2026-01-05"], "leave one of them out"),
    ],
)
def test_days_that_contradict_each_other_end_with_2(
    mtl_lora: Run, tmp_path: Path, options: list[str], words: str
) -> None:
    done = mtl_lora("retrain", "--config", _configuration(tmp_path, ROWS), *options)
    assert done.code == 2, done.err
    assert words in done.err
