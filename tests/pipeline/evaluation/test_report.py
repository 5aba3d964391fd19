"""One page that needs nothing else, whatever parts are there, and says what it was given."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.contracts import PromotionDecision, ShardInfo, ShardManifest, TaskSpec
from pipeline.evaluation import compare, summarize, write_report
from pipeline.evaluation.charts import Chart, ticks
from pipeline.evaluation.features import TaskFeatures
from pipeline.evaluation.frame import by_task
from pipeline.evaluation.plots import roc_points
from pipeline.ingestion.drift import DriftMeasure, DriftReport

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


def everything() -> dict:
    ours, theirs, base = frame(1, 2.0), frame(2, 1.5), frame(3, 0.1)
    reports = {
        name: summarize(f, SPECS, model=name, data=DATA, replicates=100)
        for name, f in (("candidate", ours), ("champion", theirs), ("base", base))
    }
    names = [s.name for s in SPECS]
    rng = np.random.default_rng(0)
    points = TaskFeatures(rng.normal(size=(40, 5)), [names[i % 4] for i in range(40)], [str(i) for i in range(40)])
    return {
        "run_name": "a <script>run</script>",
        "config": {"model": {"num_layers": 6}},
        "manifest": MANIFEST,
        **reports,
        "decision": PromotionDecision(
            verdict="HOLD", reasons=("no gain & no loss",), candidate="c", champion="h", tasks={"pick": "as before"}
        ),
        "scores": ours,
        "base_scores": base,
        "champion_scores": theirs,
        "history": [
            {"step": i, "loss": 1 / i, "task_loss": {"pick": 2 / i}, "learning_rate": 1e-4, "tokens_per_s": 300.0}
            for i in range(1, 30)
        ],
        "mixing": {n: [0.5, 0.3, 0.2] for n in names},
        "lambda_distance": {a: {b: float(a != b) for b in names} for a in names},
        "lineage": {"git commit": "abc"},
        "comparison": compare(ours, theirs, SPECS, candidate_name="c", reference_name="h", data=DATA, replicates=100),
        "drift": DriftReport(
            verdict="warn",
            tasks={n: {"label_psi": DriftMeasure(value=0.2, verdict="warn")} for n in names},
            reasons=("labels moved",),
        ),
        "features": {"LoRA": points, "MTL-LoRA": points},
        "features_note": "a note on features",
    }


class Strict(HTMLParser):
    """Every element that opens closes, in order, but for the void ones."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "hr", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(path: Path, **given: object) -> str:
    write_report(path, **given)
    text = path.read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    return text


def test_the_whole_page_is_self_contained_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html", **everything())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)|url\(|@import|<script|https?://", text)
    assert "a &lt;script&gt;run" in text
    assert "&lt;b&gt;sport" in text
    for words in (
        "HOLD",
        "no gain &amp; no loss",
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


OPTIONAL = (
    "config",
    "base",
    "champion",
    "decision",
    "scores",
    "base_scores",
    "champion_scores",
    "history",
    "mixing",
    "lambda_distance",
    "lineage",
    "comparison",
    "drift",
    "features",
)  # features_note is a text


def test_any_part_may_be_missing(tmp_path: Path) -> None:
    given = everything()
    for name in OPTIONAL:
        page(tmp_path / "r.html", **{**given, name: None, "features": None})
    page(tmp_path / "r.html", **{**given, **dict.fromkeys(OPTIONAL)})


def test_one_class_and_unscored_tasks_are_shown_with_their_reason(tmp_path: Path) -> None:
    scores = frame(1, 2.0, one_class=True)
    scores = scores[scores.task != "pick"]
    report = summarize(scores, SPECS, model="c", data=DATA, replicates=50)
    text = page(
        tmp_path / "r.html", run_name="r", config=None, manifest=MANIFEST, candidate=report, base=report, scores=scores
    )
    assert "all 60 labels are class 0; auc needs at least two classes" in text
    assert "no sample of task &#39;pick&#39; was scored" in text


def test_roc_points_run_from_corner_to_corner_and_never_fall() -> None:
    rng = np.random.default_rng(0)
    n = 5000
    p = rng.uniform(size=n)
    scores = pd.DataFrame(
        {
            "key": [str(i) for i in range(n)],
            "task": "query_ad",
            "label": (rng.random(n) < p).astype(float),
            "scores": list(np.stack([1 - p, p], axis=1)),
            "group": None,
        }
    )
    x, y = roc_points(by_task(scores, SPECS)["query_ad"])
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) <= 241
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.25, 0.95), (0, 3e-4), (0, 12345), (-1, 1), (2, 2)])
def test_ticks_are_few_round_and_within_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in found)
    assert Chart((low, high), (0, 1), "x", "y", "about").svg().startswith("<svg")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (500, "light")])
def test_chromium_lays_the_page_out_without_sideways_scroll(tmp_path: Path, width: int, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    text = page(tmp_path / "r.html", **everything())
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
