"""The report's charts: what each one shows, from the arrays of a task.

Models are drawn in one order and colour throughout: ``candidate``, ``champion``, ``base``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.evaluation.charts import Chart, heat_map, wrap
from pipeline.evaluation.frame import Floats, TaskScores
from pipeline.evaluation.metrics import ECE_BINS

MODELS = ("base", "champion", "candidate")
"""Drawn in this order, so that the candidate lies on top."""
Samples = Mapping[str, TaskScores]


def task_charts(samples: Samples) -> list[tuple[str, Markup]]:
    """Return a task's charts with their captions, as fits its kind."""
    candidate = samples["candidate"]
    kind = candidate.spec.kind
    charts: list[tuple[str, Markup]] = []
    if kind == "binary" and len(np.unique(candidate.labels)) == 2:
        charts.append(("ROC curve", roc(samples)))
    if kind == "multiclass":
        charts.append(("Confusion, share of each true class", confusion(candidate)))
    if kind == "ordinal":
        charts.append(("Expected value against label", agreement(candidate)))
    else:
        charts.append(("Reliability", reliability(samples)))
    charts.append(("Scores by class" if kind == "binary" else "Scores", histogram(candidate)))
    return charts


def roc(samples: Samples) -> Markup:
    """Draw the ROC curve of each model."""
    chart = Chart((0, 1), (0, 1), "false positive rate", "true positive rate", "ROC curve")
    chart.diagonal()
    for name in MODELS:
        if name in samples:
            chart.line(*roc_points(samples[name]), name)
    return chart.svg()


def roc_points(sample: TaskScores, most: int = 240) -> tuple[Floats, Floats]:
    """Return false and true positive rates, at most about ``most`` points, corners first kept."""
    order = np.argsort(-sample.score, kind="stable")
    hits = sample.labels[order] == 1
    ends = np.append(np.flatnonzero(np.diff(sample.score[order])), len(order) - 1)
    true, false = np.cumsum(hits)[ends] / hits.sum(), np.cumsum(~hits)[ends] / (~hits).sum()
    x, y = np.append(0.0, false), np.append(0.0, true)
    if len(x) > most:
        # Even steps along the curve's length, which spends points on its steep part too.
        along = x + y
        keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)).clip(0, len(x) - 1))
        x, y = x[keep], y[keep]
    return x, y


def reliability(samples: Samples) -> Markup:
    """Draw the observed rate against the predicted one, dots as large as their bin is full."""
    binary = samples["candidate"].spec.kind == "binary"
    x_label, y_label = ("predicted P(class 1)", "observed rate") if binary else ("top probability", "accuracy")
    chart = Chart((0, 1), (0, 1), x_label, y_label, "Reliability diagram")
    chart.diagonal()
    for name in MODELS:
        if name not in samples:
            continue
        mean, rate, share = reliability_bins(samples[name])
        chart.line(mean, rate, name)
        radii = 1.6 + 4.4 * np.sqrt(share)
        chart.points(mean, rate, name, lambda i, r=radii: float(r[i]))  # type: ignore[misc]
    return chart.svg()


def reliability_bins(sample: TaskScores, bins: int = ECE_BINS) -> tuple[Floats, Floats, Floats]:
    """Return each filled bin's mean prediction, observed rate and share of the samples."""
    truth = sample.labels if sample.spec.kind == "binary" else (sample.predicted == sample.classes).astype(np.float64)
    place = np.clip(np.ceil(sample.score * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    there = count > 0
    mean = np.bincount(place, sample.score, minlength=bins)[there] / count[there]
    rate = np.bincount(place, truth, minlength=bins)[there] / count[there]
    return mean, rate, count[there] / len(sample)


def histogram(sample: TaskScores, bins: int = 30) -> Markup:
    """Draw the scores, split by what they should say: the classes of a binary task, else right and wrong."""
    low, high = (0.0, 1.0) if sample.spec.kind != "ordinal" else (float(sample.score.min()), float(sample.score.max()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    if sample.spec.kind == "binary":
        parts = {"negative": sample.labels == 0, "positive": sample.labels == 1}
        title = "P(class 1)"
    elif sample.spec.kind == "ordinal":
        parts, title = {"positive": np.ones(len(sample), bool)}, "expected value"
    else:
        right = sample.predicted == sample.classes
        parts, title = {"negative": ~right, "positive": right}, "top probability"
    shares = {
        name: np.histogram(sample.score[mask], edges)[0] / max(1, mask.sum())
        for name, mask in parts.items()
        if mask.any()
    }
    peak = max(float(share.max()) for share in shares.values())
    chart = Chart((float(edges[0]), float(edges[-1])), (0, peak * 1.05), title, "share of class", "Score histogram")
    if sample.spec.kind not in ("binary", "ordinal"):
        chart = Chart((0, 1), (0, peak * 1.05), title, "share", "Score histogram of right and wrong answers")
    for name, share in shares.items():
        chart.bars(edges, share, name)
    return chart.svg()


def confusion(sample: TaskScores, most: int = 14) -> Markup:
    """Draw the confusion matrix, each row divided by its class's count; the ``most`` commonest classes."""
    words = [word.strip() for word in sample.spec.label_words]
    counts = np.zeros((len(words), len(words)))
    np.add.at(counts, (sample.classes, sample.predicted), 1)
    keep = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:most])
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)[np.ix_(keep, keep)]
    names = [words[i] for i in keep]
    return heat_map(shares, names, names, "Confusion matrix", lambda v: f"{100 * v:.0f}", "true", "predicted")


def agreement(sample: TaskScores, most: int = 600) -> Markup:
    """Draw expected value against label, a sample of the points where there are many."""
    rows = np.linspace(0, len(sample) - 1, min(most, len(sample))).astype(np.int64)
    values = np.asarray(sample.spec.label_values)
    ends = (float(values.min()), float(values.max()))
    chart = Chart(ends, ends, "label", "expected value", "Expected value against label")
    chart.diagonal()
    chart.points(sample.labels[rows], sample.score[rows], "candidate faint", 2.4)
    return chart.svg()


def learning_curve(
    history: Sequence[Mapping[str, Any]], order: Sequence[str], width: int = 680, height: int = 280
) -> Markup:
    """Draw training loss over steps, smoothed, and the tasks' own losses in the order of :func:`logged_tasks`."""
    steps = np.array([row["step"] for row in history], np.float64)
    total = np.array([row["loss"] for row in history], np.float64)
    smooth: dict[str, tuple[Floats, Floats]] = {}
    for task in logged_tasks(history, order):
        points = [(row["step"], (row.get("task_loss") or {}).get(task)) for row in history]
        x, y = np.array([point for point in points if point[1] is not None], np.float64).T
        smooth[task] = x, smoothed(y)
    every = np.concatenate([smoothed(total), *(y for _, y in smooth.values())])
    top = float(np.nanquantile(np.append(total, every), 0.99)) * 1.08
    chart = Chart((float(steps[0]), float(steps[-1])), (0.0, top), "step", "loss", "Learning curve", width, height)
    for i, (x, y) in enumerate(smooth.values()):
        chart.line(x, np.minimum(y, top), f"task{i % 8}")
    chart.line(steps, np.minimum(smoothed(total), top), "total")
    return chart.svg()


def logged_tasks(history: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """Return the tasks that a training log has a loss of, in the order given."""
    logged = {t for row in history for t, loss in (row.get("task_loss") or {}).items() if loss is not None}
    return [task for task in order if task in logged]


def smoothed(values: Sequence[float] | Floats, share: float = 0.05) -> Floats:
    """Return a centred running mean over a share of the series, shorter at its ends."""
    numbers = np.asarray(values, np.float64)
    half = int(len(numbers) * share / 2)
    sums = np.append(0.0, np.cumsum(numbers))
    index = np.arange(len(numbers))
    reach = np.minimum(half, np.minimum(index, len(numbers) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def series(history: Sequence[Mapping[str, Any]], key: str, label: str) -> Markup | None:
    """Draw one number of the training log over steps; None where the log lacks it."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    if len(rows) < 2:
        return None
    x, y = np.array(rows, np.float64).T
    chart = Chart((float(x[0]), float(x[-1])), (0.0, float(y.max()) * 1.08), "step", "", f"{label} over steps")
    chart.line(x, y, "total")
    return chart.svg()


def scatter(points: Floats, codes: np.ndarray, about: str) -> Markup:
    """Draw points of a plane coloured by code, without numbers on the axes (t-SNE has no units)."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    chart = Chart((x0, x1), (y0, y1), "", "", about, bare=True)
    for code in np.unique(codes):
        part = points[codes == code]
        chart.points(part[:, 0], part[:, 1], f"task{int(code) % 8} faint", 2.2)
    return chart.svg()


def forest(
    marks: Mapping[str, float | None], interval: tuple[float, float] | None, ends: tuple[float, float]
) -> Markup:
    """Draw one task's row of the table: each model's value on a common scale, the candidate with its interval.

    Args:
        marks: value by name: ``candidate``, ``champion``, ``base``, ``best``.
        interval: of the candidate.
        ends: the scale's range, the same in each row.
    """
    width, height, middle = 200.0, 26.0, 13.0

    def px(value: float) -> float:
        return 8 + (value - ends[0]) / (ends[1] - ends[0]) * (width - 16)

    parts = [f'<path class="grid" d="M8 {middle}H{width - 8}"/>']
    if (best := marks.get("best")) is not None:
        parts.append(f'<path class="best" d="M{px(best):.1f} 5V21"/>')
    if interval is not None:
        parts.append(f'<path class="whisker candidate" d="M{px(interval[0]):.1f} {middle}H{px(interval[1]):.1f}"/>')
    for name in MODELS:
        if (value := marks.get(name)) is not None:
            parts.append(f'<circle class="mark {name}" cx="{px(value):.1f}" cy="{middle}" r="4.4"/>')
    return wrap("".join(parts), width, height, ", ".join(f"{k} {v:.3f}" for k, v in marks.items() if v is not None))
