"""Does a model that sees answer better than one that does not, and what do images cost in the stream?

Images are read and decoded as training reads them, against a bare webdataset loop that decodes the same to RGB. The
answers are those of finished runs of suite ``image_text``, ``RUNS/image_text`` and, the same with every image grey,
``RUNS/image_text_blank`` (``MTL_LORA_IMAGE_RUNS`` names RUNS, else ``runs``).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from jobs.config import load_config
from pipeline.contracts import EvaluationReport, ShardManifest
from pipeline.images import decoded
from pipeline.stream import MixedStream
from tests.benchmarks.stream_webdataset import ALONE, BATCH, bare, both, consume, tars_of, write_images
from tests.benchmarks.timing import hardware, ratio, row, versions

SEEN, BLANK = "image_text", "image_text_blank"
COMMAND = "mtl-lora retrain --config image_text data.root=OUT model.base=image-base"
Row = dict[str, Any]


def images_a_second(folder: Path) -> Row:
    """Return the row of images that the stream gives and the project decodes, over the bare loop's."""
    write_images(folder)
    urls = [str(folder / tar) for tar in tars_of(folder)]

    def ours() -> None:
        stream = MixedStream(folder, 0, BATCH)
        for samples in stream.batches(ALONE, 0, stream.steps_per_epoch):
            for sample in samples:
                decoded(sample.image or b"").load()

    seconds = both(ours, lambda: consume(bare(urls, "pilrgb")))
    value = ratio(seconds, "bare", "stream")
    rate = MixedStream(folder, 0, BATCH).num_samples / statistics.median(seconds["stream"])
    measure = "images/s through MixedStream, decoded as RGB, 1 process: over a bare webdataset loop"
    return row(measure, ">= 1.0", value, value >= 1.0, images_per_s=round(rate))


def _trained(run: Path) -> dict[str, Any]:
    """Return for how many steps and epochs a run was trained, all tasks together."""
    manifest = ShardManifest.read(run / "shards" / "manifest.json")
    train_samples = sum(manifest.samples_of(task.name, "train") for task in manifest.tasks)
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    return {
        "steps": last["step"],
        "samples_read": last["samples"],
        "train_samples": train_samples,
        "epochs": round(last["samples"] / train_samples, 2),
    }


def settings(run: Path) -> dict[str, Any]:
    """Return what a finished run was told that its answers depend on; none where it is not there."""
    if not (run / "evaluation.json").is_file():
        return {}
    config = load_config(run / "config.yaml")
    base = json.loads((Path(config.model.base) / "config.json").read_text())
    return {
        "base": {name: base["text_config"][name] for name in ("hidden_size", "num_hidden_layers")}
        | {"image_tokens": base["image_seq_length"], "vision": base["vision_config"]["model_type"]},
        "model": config.model.model_dump(mode="json", include={"dtype", "max_length"}),
        "adapter": config.adapter.model_dump(mode="json", include={"method", "r", "lora_alpha", "target_modules"}),
        "mixture": config.mixture.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", include={"duplicates", "overlap", "conflicts"}),
        "training": config.training.model_dump(
            mode="json",
            include=dict.fromkeys(("global_batch_size", "max_steps", "learning_rate", "num_workers"), True)
            | {"kept_states": {"precision"}},
        ),
    }


def answers(runs: Path) -> list[Row]:
    """Return the rows of what the finished runs answered."""
    found = {name: runs / name / "evaluation.json" for name in (SEEN, BLANK)}
    if not found[SEEN].is_file():
        return [{"measure": f"answers: no finished run {SEEN}", "goal": "-", "value": None, "met": None}]
    tasks = EvaluationReport.read(found[SEEN]).tasks
    vqa, captions, nlvr = (tasks[name] for name in ("easy_vqa", "easy_captions", "nlvr"))
    accuracy = vqa.accuracy or 0.0
    right = captions.more["exact_match"] or 0.0
    manifest = ShardManifest.read(runs / SEEN / "shards" / "manifest.json")
    rows = [
        row(
            "easy_vqa accuracy, images of test alone",
            ">= 0.90",
            accuracy,
            accuracy >= 0.90,
            ci95=vqa.ci95,
            n=vqa.n,
            **_trained(runs / SEEN),
        ),
        row("easy_captions exact match", ">= 0.80", right, right >= 0.80, ci95=captions.ci95),
    ]
    counts: dict[str, int] = {}
    for shard in manifest.shards_of("nlvr", "test"):
        for label, count in shard.label_counts.items():
            counts[label] = counts.get(label, 0) + count
    majority = max(counts.values()) / sum(counts.values())
    apart = nlvr.ci95 is not None and nlvr.ci95[0] > majority
    rows.append(row("nlvr accuracy", f"> {majority:.3f}, the majority", nlvr.accuracy or 0.0, apart, ci95=nlvr.ci95))
    if found[BLANK].is_file():
        blank = EvaluationReport.read(found[BLANK]).tasks["easy_vqa"].accuracy or 0.0
        gain = accuracy - blank
        measure = "easy_vqa accuracy over the same run with grey images"
        rows.append(row(measure, ">= 0.15", gain, gain >= 0.15, accuracy=blank, **_trained(runs / BLANK)))
    return rows


def run() -> dict[str, Any]:
    """Measure the images a second, and tell what the finished runs answered."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        rows = [images_a_second(Path(name))]
    runs = Path(os.environ.get("MTL_LORA_IMAGE_RUNS", "runs"))
    rows += answers(runs)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks image_text",
        "runs": COMMAND,
        "settings": {name: settings(runs / name) for name in (SEEN, BLANK)},
        "protocol": (
            "seed 0; images: in turns in one process, medians of ratios a round; answers: of finished runs, with every "
            "image grey beside"
        ),
        "hardware": before,
        "versions": versions("webdataset", "torch", "transformers", "pillow"),
        "rows": rows,
        "not_measured": "larger bases, images on a network, accelerators",
    }
