"""One page that needs nothing else, whatever parts are there, and says what it was given."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.contracts import PromotionDecision, ShardInfo, ShardManifest, TaskSpec
from pipeline.evaluation.compare import compare
from pipeline.evaluation.features import TaskFeatures
from pipeline.evaluation.summary import summarize
from pipeline.ingestion.drift import DriftMeasure, DriftReport
from pipeline.report import EvaluatedModel, ReportPage, write_report
from pipeline.report.adapter_view import AdapterView

ROOT = Path(__file__).resolve().parents[3]
SPECS = (
    TaskSpec(name="query_ad", template="{q}", label_words=(" no", " yes")),
    TaskSpec(name="vertical", kind="multiclass", template="{q}", label_words=(" travel", " <b>sport</b>", " money")),
    TaskSpec(name="similarity", kind="ordinal", template="{q}", label_words=(" 0", " 1", " 2"), label_values=(0, 1, 2)),
    TaskSpec(name="pick", kind="choice", template="{q}"),
)
DATA = {"manifest_sha256": "ab" * 32, "split": "test"}


def frame(seed: int, skill: float, one_class: bool = False) -> pd.DataFrame:
    world, rng, rows = np.random.default_rng(0), np.random.default_rng(seed), []
    for spec in SPECS:
        for i in range(60):
            classes = spec.num_classes or int(world.integers(2, 5))
            label = 0 if one_class else int(world.integers(0, classes))
            logits = rng.normal(size=classes)
            logits[label] += skill
            p = np.exp(logits) / np.exp(logits).sum()
            rows.append((f"{i:04d}", spec.name, float(label), p, None))
    return pd.DataFrame(rows, columns=["key", "task", "label", "scores", "group"])


MANIFEST = ShardManifest(
    tasks=SPECS,
    shards=tuple(
        ShardInfo(
            path=f"{s.name}.tar",
            task=s.name,
            split="test",
            samples=60,
            bytes=1,
            sha256="0" * 64,
            label_counts={"0": 60},
        )
        for s in SPECS
    ),
    source_sha256="0" * 64,
)


@functools.cache
def everything() -> ReportPage:
    frames = {"candidate": frame(1, 2.0), "champion": frame(2, 1.5), "base": frame(3, 0.1)}
    models = {
        name: EvaluatedModel(summarize(scores, SPECS, model=name, data=DATA, replicates=100), scores)
        for name, scores in frames.items()
    }
    names = [s.name for s in SPECS]
    rng = np.random.default_rng(0)
    points = TaskFeatures(rng.normal(size=(40, 5)), [names[i % 4] for i in range(40)], [str(i) for i in range(40)])
    return ReportPage(
        run_name="a <script>run</script>",
        manifest=MANIFEST,
        **models,
        decision=PromotionDecision(
            verdict="HOLD",
            reasons=("no gain & no loss",),
            candidate="c",
            champion="h",
            tasks={"pick": "as before"},
            evidence=("champion: version 9", "anchor: version 3, the best earlier champion", "look 2 at this holdout"),
        ),
        comparison=compare(
            frames["candidate"],
            frames["champion"],
            SPECS,
            candidate_name="c",
            reference_name="h",
            data=DATA,
            replicates=100,
        ),
        history=[
            {"step": i, "loss": 1 / i, "task_loss": {"pick": 2 / i}, "learning_rate": 1e-4, "tokens_per_s": 300.0}
            for i in range(1, 30)
        ],
        adapter=AdapterView({n: [0.5, 0.3, 0.2] for n in names}, {a: {b: float(a != b) for b in names} for a in names}),
        features={"LoRA": points, "MTL-LoRA": points},
        features_note="a note on features",
        drift=DriftReport(
            verdict="warn",
            tasks={n: {"label_psi": DriftMeasure(value=0.2, verdict="warn")} for n in names},
            reasons=("labels moved",),
        ),
        lineage={"git commit": "abc"},
        config={"model": {"num_layers": 6}},
    )


class Strict(HTMLParser):
    """Every element that opens closes, in order, but for the void ones; keeps the ids and what refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.there: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "hr", "link", "img", "input"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.there |= {found["href"].removeprefix("#")} if found.get("href") else set()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(path: Path, page: ReportPage) -> str:
    write_report(path, page)
    text = path.read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert parser.there <= set(parser.ids)
    return text


def test_the_whole_page_is_self_contained_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    text = written(tmp_path / "r.html", everything())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)|url\(|@import|<script|https?://", text)
    assert "a &lt;script&gt;run" in text
    assert "&lt;b&gt;sport" in text
    for words in (
        "HOLD",
        "no gain &amp; no loss",
        "champion: version 9; anchor: version 3, the best earlier champion; look 2 at this holdout.",
        "Paired differences",
        "ROC curve",
        "Confusion",
        "Learning curve",
        "Learning rate",
    ):
        assert words in text
    for words in (
        "Which up-projection",
        "silhouette",
        "a note on features",
        "labels moved",
        "abc",
        "num_layers",
        "prefers-color-scheme: dark",
    ):
        assert words in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).lower().replace("finance", "")


OPTIONAL = [
    field
    for field in dataclasses.fields(ReportPage)
    if field.default is not MISSING or field.default_factory is not MISSING
]


def left_out(field: dataclasses.Field) -> object:
    return field.default if field.default is not MISSING else field.default_factory()


def test_any_part_may_be_missing(tmp_path: Path) -> None:
    whole = everything()
    models = {name: EvaluatedModel(getattr(whole, name).report) for name in ("candidate", "champion", "base")}
    page = dataclasses.replace(whole, **models, features={})
    for field in OPTIONAL:
        written(tmp_path / "r.html", dataclasses.replace(page, **{field.name: left_out(field)}))
    bare = dataclasses.replace(page, **{field.name: left_out(field) for field in OPTIONAL})
    text = written(tmp_path / "r.html", bare)
    for words in ("ROC curve", "Learning curve", "Which up-projection", "Drift", "Lineage", "Paired", "Configuration"):
        assert words not in text


@pytest.mark.parametrize("name", ["candidate", "champion", "base"])
def test_scores_of_one_model_may_be_missing(tmp_path: Path, name: str) -> None:
    page = dataclasses.replace(everything(), features={}, history=(), adapter=None)
    text = written(tmp_path / "r.html", dataclasses.replace(page, **{name: EvaluatedModel(getattr(page, name).report)}))
    assert ("ROC curve" in text) == (name != "candidate")


def test_one_class_and_unscored_tasks_are_shown_with_their_reason(tmp_path: Path) -> None:
    scores = frame(1, 2.0, one_class=True)
    scores = scores[scores.task != "pick"]
    report = summarize(scores, SPECS, model="c", data=DATA, replicates=50)
    model = EvaluatedModel(report, scores)
    page = ReportPage(run_name="r", manifest=MANIFEST, candidate=model, base=EvaluatedModel(report))
    text = written(tmp_path / "r.html", page)
    assert "all 60 labels are class 0; auc needs at least two classes" in text
    assert "no sample of task &#39;pick&#39; was scored" in text


def test_features_of_one_task_have_no_separation(tmp_path: Path) -> None:
    points = TaskFeatures(np.random.default_rng(0).normal(size=(12, 5)), ["pick"] * 12, [str(i) for i in range(12)])
    page = ReportPage(
        run_name="r",
        manifest=MANIFEST,
        candidate=EvaluatedModel(everything().candidate.report),
        features={"LoRA": points},
    )
    assert "LoRA · silhouette –" in written(tmp_path / "r.html", page)


def small() -> ReportPage:
    scores = frame(1, 2.0)
    report = summarize(scores, SPECS, model="candidate", data=DATA, replicates=20)
    return ReportPage(run_name="r", manifest=MANIFEST, candidate=EvaluatedModel(report, scores))


def test_one_page_has_the_same_bytes_in_each_process_whatever_the_users_settings(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\ntext.color: red\nsvg.fonttype: path\n")
    code = "from tests.pipeline.report.test_page import small, write_report; write_report('there.html', small())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    write_report(tmp_path / "here.html", small())
    here = (tmp_path / "here.html").read_bytes()
    assert here == (tmp_path / "there.html").read_bytes()
    assert here.count(b"<svg") > 10


def test_matplotlib_and_templates_are_loaded_only_when_a_page_is_written() -> None:
    code = "import sys, pipeline.report; sys.exit(bool({'matplotlib', 'jinja2', 'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (500, "light")])
def test_chromium_lays_the_page_out_without_sideways_scroll(tmp_path: Path, width: int, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    text = written(tmp_path / "r.html", everything())
    probe = """<script>window.addEventListener('load', () => {
      const box = document.documentElement, style = getComputedStyle(document.body);
      document.title = JSON.stringify({over: box.scrollWidth - box.clientWidth, paper: style.backgroundColor,
        charts: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0).length});
    });</script>"""
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    options += [f"--window-size={width},2000", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom = subprocess.run(
        [browser, *options, f"file://{tmp_path / 'probed.html'}"], capture_output=True, text=True, timeout=100
    ).stdout
    title = re.search(r"<title>(\{.*?\})</title>", dom)
    assert title, dom[:300]
    assert '"over":0' in title[1]
    assert ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(253, 252, 250)") in title[1]
    assert int(re.search(r'"charts":(\d+)', title[1])[1]) >= 15
