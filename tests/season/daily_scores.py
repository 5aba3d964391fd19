"""A day's input of all tasks, mixed, scored by ``mtl-lora score`` with whichever version is champion."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.serving.batch_output import MANIFEST, ScoreManifest

_LABELS = ("label", "label_probabilities")


def score_day(folder: Path, day: dt.date, model: str, champion: int, uri: str) -> ScoreManifest:
    """Score what a day's partition asks; each row that can be is scored once, by the champion.

    Args:
        folder: of the season; partitions lie under ``partitions``, input and scores go under ``daily``.
        day: whose rows are asked.
        model: registered name.
        champion: number of the version that must answer.
        uri: of the registry.
    """
    rows = []
    for path in sorted((folder / "partitions" / day.isoformat()).glob("*.jsonl.gz")):
        task = {"task": path.name.split(".")[0]}
        rows += [task | json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows.sort(key=lambda row: str(row["id"]))  # mixed, as traffic is
    asked = folder / "daily" / f"{day.isoformat()}-{champion}.jsonl"
    asked.parent.mkdir(exist_ok=True)
    unlabelled = [{name: value for name, value in row.items() if name not in _LABELS} for row in rows]
    asked.write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    output = asked.with_suffix("")
    command = [sys.executable, "-m", "jobs.cli", "score", "--model", f"models:/{model}@champion"]
    command += ["--input", str(asked), "--output", str(output), "--tracking-uri", uri, "--max-rejected-share", "0.1"]
    with (folder / "score.log").open("a") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, env=os.environ | {"RAY_worker_niceness": "0"}, check=False
        )
    assert done.returncode == 0, f"{day}: exit code {done.returncode} of score; see {folder / 'score.log'}"
    manifest = ScoreManifest.read(output / MANIFEST)
    bad = sum(row.keys() <= {"task", "id", "date"} for row in rows)
    assert manifest.model == f"models:/{model}/{champion}", manifest.model
    assert (manifest.rows, manifest.rejected) == (len(rows) - bad, bad), manifest
    return manifest
