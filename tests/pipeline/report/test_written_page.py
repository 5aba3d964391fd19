"""Answers that are texts on the page: shown as they are, escaped, beside what was asked and what the base wrote."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import Sample, ShardInfo, ShardManifest, TaskSpec
from pipeline.evaluation.predict import score_table
from pipeline.evaluation.summary import summarize
from pipeline.images import decoded, png_of
from pipeline.report import EvaluatedModel, ReportPage, write_report

TASKS = (
    TaskSpec(name="colour", kind="generation", template="{text}:", metric="bleu"),
    TaskSpec(name="topic", kind="multiclass", template="{t}", label_words=(" a", " b", " c"), answer_by="generation"),
)
SHARD = ShardInfo(path="x.tar", task="colour", split="test", samples=9, bytes=1, sha256="0" * 64, label_counts={"0": 9})
MANIFEST = ShardManifest(tasks=TASKS, shards=(SHARD,), source_sha256="0" * 64)


def _model(text: str) -> EvaluatedModel:
    samples, probabilities, texts = [], [], []
    for i in range(12):
        samples.append(Sample(key=f"{i}", task="colour", fields={}, label=0, answers=("it is a <b>red</b> ball",)))
        probabilities.append(np.array([0.5]))
        texts.append(text if i % 2 else "")
        samples.append(Sample(key=f"{i}", task="topic", fields={}, label=i % 3))
        probabilities.append(np.eye(3)[i % 3] if i % 4 else np.zeros(3))
        texts.append("abc"[i % 3] if i % 4 else "neither")
    scores = score_table(samples, probabilities, texts)
    return EvaluatedModel(summarize(scores, TASKS, model="m", data={}, replicates=50), scores)


@pytest.mark.parametrize("with_base", [True, False])
def test_what_was_asked_and_written_is_shown_and_escaped(tmp_path: Path, with_base: bool) -> None:
    page = ReportPage(
        run_name="colours",
        manifest=MANIFEST,
        candidate=_model("it is a <i>red</i> ball"),
        base=_model("who knows") if with_base else None,
        prompts={("colour", "1"): "what <u>colour</u> is it?"},
    )
    write_report(tmp_path / "page.html", page)
    html = (tmp_path / "page.html").read_text()
    assert html.count('class="examples"') == 1
    for text in (
        "what &lt;u&gt;colour",
        "it is a &lt;i&gt;red",
        "it is a &lt;b&gt;red",
        "by chrF of each sample",
        "(nothing)",
    ):
        assert text in html
    assert ("who knows" in html) is ("changed most against the base" in html) is with_base
    assert "0: 9" not in html  # texts are no classes
    assert "Answered by a label word" in html and "Confusion, share of each true class" in html


def test_images_stand_beside_the_answers_that_were_given_to_them(tmp_path: Path) -> None:
    spec = TaskSpec(name="shape", template="{q}", label_words=(" round", " square"), image_field="image")
    random = np.random.default_rng(0)
    samples = [Sample(key=str(i), task="shape", fields={}, label=i % 2, image=b"x") for i in range(40)]
    scores = score_table(samples, [np.array([1 - p, p]) for p in random.random(40)], [None] * 40)
    manifest = MANIFEST.model_copy(update={"tasks": (spec,), "shards": ()})
    asked: list[str] = []

    def images_of(task: str, keys: Collection[str]) -> dict[str, bytes]:
        asked.extend(keys)
        return {key: png_of(np.full((300, 200, 3), int(key), np.uint8)) for key in keys}

    candidate = EvaluatedModel(summarize(scores, (spec,), model="m", data={}, replicates=50), scores)
    page = ReportPage(run_name="shapes", manifest=manifest, candidate=candidate, images_of=images_of)
    write_report(tmp_path / "page.html", page)
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', html := (tmp_path / "page.html").read_text())
    pixels = [decoded(base64.b64decode(image)) for image in shown]
    assert [image.getpixel((0, 0)) for image in pixels] == [(int(key),) * 3 for key in asked]
    assert {image.size for image in pixels} == {(85, 128)} and len(asked) == 6
    assert "by the right answer&#39;s probability of each sample" in html
