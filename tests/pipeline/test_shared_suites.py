"""All real suites go through ingestion, stream and plan."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import LengthGrouping, MixedStream, plan_stream, read_split

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SUITES = ("commonsense", "glue", "ads", "reviews", "vision")
VQA_ANSWERS = 13


def specs_of(root: Path, suite: str) -> list[TaskSpec]:
    """Make plain specs out of the suites' own description."""
    specs = []
    for name, info in json.loads((root / "manifest.json").read_text()).items():
        if not name.startswith(f"{suite}/"):
            continue
        task, fields = name.split("/")[1], info["fields"]
        names = [field for field in ("question", "text_a", "text_b") if field in fields]
        template = "".join(f"{{{field}}}\n" for field in names) + "Answer:"
        if info["kind"] == "choice":
            specs.append(TaskSpec(name=task, kind="choice", template=template))
        elif task == "stsb":
            words, values = [f" {n}" for n in range(6)], range(6)
            specs.append(TaskSpec(name=task, kind="ordinal", template=template, label_words=words, label_values=values))
        else:
            words = [f" w{n}" for n in range(info.get("num_labels") or VQA_ANSWERS)]
            kind = "binary" if len(words) == 2 else "multiclass"
            image = "image" if "image" in fields else None
            specs.append(TaskSpec(name=task, kind=kind, template=template, label_words=words, image_field=image))
    return specs


@pytest.mark.parametrize("suite", SUITES)
def test_a_whole_suite_is_prepared_planned_and_streamed(shared_data: Path, tmp_path: Path, suite: str) -> None:
    config = DataConfig(source="records", root=str(shared_data / suite), max_rejected_share=0)
    manifest = prepare(config, specs_of(shared_data, suite), tmp_path, seed=0)
    published = json.loads((shared_data / "manifest.json").read_text())
    put_aside = Counter[tuple[str, str]]()
    for reject in manifest.rejected:
        put_aside[reject.task, reject.split] += reject.records
    for spec in manifest.tasks:
        for split in ("train", "test"):
            found = manifest.samples_of(spec.name, split)
            assert found + put_aside[spec.name, split] == published[f"{suite}/{spec.name}"][split]
        assert manifest.samples_of(spec.name, "test") == published[f"{suite}/{spec.name}"]["test"]
    plain = plan_stream(tmp_path, 0, 32, num_ranks=2)
    grouped = plan_stream(tmp_path, 0, 32, num_ranks=2, length_grouping=LengthGrouping())
    assert grouped.padding_share < plain.padding_share
    assert plain.samples == sum(manifest.samples_of(spec.name, "train") for spec in manifest.tasks)
    stream = MixedStream(tmp_path, 0, 32)
    keys = [key for step in range(stream.steps_per_epoch) for key in stream.global_batch(step)][: stream.num_samples]
    assert len(set(keys)) == stream.num_samples
    first = next(iter(read_split(tmp_path, "test")))
    assert (first.image is not None) == (suite == "vision")
    assert ShardManifest.read(tmp_path / "manifest.json") == manifest
