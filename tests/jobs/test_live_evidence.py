"""Labels of live requests become evidence, and take a miscalibrated canary back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.live_evidence import feedback, live_comparison
from jobs.run import Run
from pipeline.errors import InputError
from pipeline.promotion.provenance import Provenance
from pipeline.promotion.versions import Version
from pipeline.serving.live_log import LiveLog, read_state

NAME = "models:/ads-relevance"
TASKS = {"clicks": {"template": "{text}:", "label_words": [" no", " yes"]}}


def _config(root: Path, *more: str) -> Run:
    path = root / "run.yaml"
    tasks = json.dumps(TASKS)
    path.write_text(f"name: live\nrun_root: {root}\ndata: {{source: records, root: data}}\ntasks: {tasks}\n")
    return Run(load_config(path, more))


def _version(number: int) -> Version:
    return Version(number, "run", "", Provenance(run="r", manifest_sha256="a" * 64), ())


def test_labels_that_come_later_are_evidence_and_hold_a_canary_to_its_calibration(tmp_path: Path) -> None:
    run, rng = _config(tmp_path, f"promotion.live.log={tmp_path / 'log'}"), random.Random(0)
    assert live_comparison(run, _version(2), _version(1)) is None
    log, labels = LiveLog(str(tmp_path / "log"), 10, 60), []
    for number in range(400):
        truth = int(rng.random() < 0.3)
        labels.append({"request": f"r{number}", "label": truth})
        for version, role, score in (
            (1, "live", 0.3 + 0.1 * truth + 0.2 * rng.random()),
            (2, "shadow", 0.2 + 0.3 * truth + 0.2 * rng.random()),
        ):
            row = (f"r{number}", 0, None, None, "clicks", f"{NAME}/{version}", role, score, [1 - score, score])
            log.add([row])
        labels.append({"request": f"c{number}", "label": int(rng.random() < 0.1)})
        log.add([(f"c{number}", 0, None, None, "clicks", f"{NAME}/3", "canary", 0.6, [0.4, 0.6])])
    log.flush()
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    found = feedback(run.config, str(tmp_path / "labels.jsonl"))
    assert found["labels"] == 800 and found["rows"] == {f"{NAME}/{number}": 400 for number in (1, 2, 3)}
    assert list(found["taken_back"]) == [f"{NAME}/3"] == list(read_state(str(tmp_path / "log"))["taken_back"])
    assert json.loads((tmp_path / "notices.jsonl").read_text())["event"] == "TAKEN_BACK"
    comparison = live_comparison(run, _version(2), _version(1))
    assert comparison is not None and comparison.tasks["clicks"].verdict == "better"


def test_feedback_needs_a_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set promotion\.live\.log"):
        feedback(_config(tmp_path).config, "labels.jsonl")
