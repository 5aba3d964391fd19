"""How fast are AUC and its paired bootstrap against scikit-learn, and mixed-task scoring against a generate pass?"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from pipeline.evaluation.auc_bootstrap import paired_auc_bootstrap
from pipeline.evaluation.ranking import auc
from tests.benchmarks.timing import hardware, interleaved, ratio, row, versions

ROWS_AUC = 10_000_000
ROWS_BOOTSTRAP, REPLICATES, LOOP = 100_000, 1000, 5
ROWS_SCORED, LAYERS = 64, 8


def _binormal(num: int, rate: float, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = (rng.random(num) < rate).astype(np.int8)
    return labels, (rng.normal(size=num) + labels).astype(dtype)


def _auc(rate: float, dtype: Any) -> dict[str, Any]:
    labels, scores = _binormal(ROWS_AUC, rate, dtype)
    found: dict[str, float] = {}
    candidates: dict[str, Callable[[], Any]] = {
        "here": lambda: found.update(here=auc(labels, scores)),
        "scikit-learn": lambda: found.update(theirs=roc_auc_score(labels, scores)),
    }
    seconds = interleaved(candidates, rounds=2, warm_up=0)
    difference = abs(found["here"] - found["theirs"])
    value = ratio(seconds, "scikit-learn", "here")
    return row(
        f"AUC of 10 million {np.dtype(dtype).name} scores, positive rate {rate}: scikit-learn's time over ours",
        ">= 2",
        value,
        value >= 2 and difference < 1e-12,
        seconds={k: round(statistics.median(v), 3) for k, v in seconds.items()},
        difference=float(difference),
    )


def _bootstrap() -> dict[str, Any]:
    labels, first = _binormal(ROWS_BOOTSTRAP, 0.2)
    second = first + 0.5 * np.random.default_rng(1).normal(size=ROWS_BOOTSTRAP)
    rng = np.random.default_rng(2)

    def loop() -> None:
        for _ in range(LOOP):
            rows = rng.integers(0, ROWS_BOOTSTRAP, ROWS_BOOTSTRAP)
            roc_auc_score(labels[rows], first[rows]) - roc_auc_score(labels[rows], second[rows])

    candidates = {"here": lambda: paired_auc_bootstrap(labels, first, second, rng, REPLICATES), "loop": loop}
    seconds = interleaved(candidates, rounds=4, warm_up=1)
    value = ratio(seconds, "loop", "here") * REPLICATES / LOOP
    return row(
        "1,000 paired bootstrap AUC differences on 100,000 rows: scikit-learn loop's time over ours",
        ">= 30",
        value,
        value >= 30,
        seconds_here=round(statistics.median(seconds["here"]), 3),
        seconds_loop=round(statistics.median(seconds["loop"]) * REPLICATES / LOOP, 1),
        note=f"the loop was timed on {LOOP} of its 1,000 replicates a round",
    )


def _ads_like(rng: np.random.Generator) -> str:
    words = ("shoes", "flights", "hotel", "insurance", "credit", "laptop", "garden", "organic", "delivery", "winter")
    return " ".join(rng.choice(words, max(3, int(rng.lognormal(2.6, 0.6)))))


def _scoring() -> list[dict[str, Any]]:
    import pandas as pd
    from transformers import pipeline as hugging_face

    from pipeline.contracts import TaskSpec
    from pipeline.modeling.adapter import AdapterConfig, build_adapter
    from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.predictor import Predictor, PredictorSpec
    from pipeline.modeling.scoring import LabelScorer, Scorer

    names = ("query_keyword", "query_ad", "ad_landing_page", "query_quality")
    template = "Query: {query}\nAd: {ad}\nRelevant:"
    tasks = tuple(TaskSpec(name=n, template=template, label_words=(" no", " yes")) for n in names)
    base = BaseModelConfig(num_layers=LAYERS)
    spec = PredictorSpec(tasks=tasks, base=base)
    scorer = Scorer(
        LabelScorer(build_adapter(AdapterConfig(), load_base(base), names)), Encoder(load_tokenizer(base), tasks, 256)
    )
    predictor = Predictor(spec, scorer)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [{"task": names[i % 4], "query": _ads_like(rng), "ad": _ads_like(rng)} for i in range(ROWS_SCORED)]
    )
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = "left"
    generate = hugging_face("text-generation", model=load_base(base), tokenizer=tokenizer)
    prompts = {n: [template.format(**r) for r in frame[frame.task == n].to_dict("records")] for n in names}

    def passes(batch_size: int) -> Callable[[], None]:
        def run() -> None:
            for name in names:
                generate(prompts[name], max_new_tokens=1, do_sample=False, batch_size=batch_size)

        return run

    candidates = {"here": lambda: predictor.predict(frame), "batched": passes(16), "default": passes(1)}
    seconds = interleaved(candidates, rounds=2, warm_up=1)
    rows = []
    for name, what in (("default", "its default, one row at a time"), ("batched", "batches of 16")):
        value = ratio(seconds, name, "here")
        rows.append(
            row(
                f"scoring {ROWS_SCORED} mixed rows of 4 tasks: rows a second over Hugging Face's pipeline, {what}",
                ">= 3",
                value,
                value >= 3,
                rows_per_s={k: round(ROWS_SCORED / statistics.median(v), 1) for k, v in seconds.items()},
            )
        )
    return rows


def run() -> dict[str, Any]:
    """Measure AUC, the bootstrap and batch scoring."""
    start = time.perf_counter()
    rows = [_auc(0.5, np.float64), _auc(0.02, np.float32), _bootstrap(), *_scoring()]
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks evaluation_speed",
        "hardware": hardware(),
        "versions": versions("numpy", "scikit-learn", "scipy", "transformers", "torch"),
        "protocol": "candidates take turns in one process, medians of ratios a round",
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "not_measured": "accelerators; the pipeline answers with one generated token, the base without adapter",
    }
