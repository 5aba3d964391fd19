"""Answers that are texts on the page: shown as they are, escaped, beside what was asked and what the base wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import Sample, ShardInfo, ShardManifest, TaskSpec
from pipeline.evaluation.predict import score_table
from pipeline.evaluation.summary import summarize
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
