"""The report's charts: what each one shows, from the arrays of a task.

Models are drawn in one order and colour throughout: ``candidate``, ``champion``, ``base``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from sklearn.metrics import roc_curve

from pipeline.evaluation.metrics import ECE_BINS
from pipeline.evaluation.score_table import Floats, TaskScores
from pipeline.report.drawing import INK, TASKS, Chart, plane, plot

MODELS = ("base", "champion", "candidate")
"""Drawn in this order, so that the candidate lies on top."""
Samples = Mapping[str, TaskScores]


def task_charts(samples: Samples) -> list[tuple[str, Chart]]:
    """Return a task's charts with their captions, as fits its kind."""
    candidate = samples["candidate"]
    kind = candidate.spec.kind
    charts: list[tuple[str, Chart]] = []
    if kind == "generation":
        return charts
    if candidate.spec.is_written:  # there are no scores to draw
        return [("Confusion, share of each true class", confusion(candidate))] if kind == "multiclass" else charts
    if kind == "binary" and len(np.unique(candidate.labels)) == 2:
        charts.append(("ROC curve", roc(samples)))
    if kind == "multiclass":
        charts.append(("Confusion, share of each true class", confusion(candidate)))
    if kind in ("ordinal", "regression"):
        charts.append((f"{_numbers(candidate).capitalize()} against label", agreement(candidate)))
    else:
        charts.append(("Reliability", reliability(samples)))
    charts.append(("Scores by class" if kind == "binary" else "Scores", histogram(candidate)))
    return charts


def _numbers(sample: TaskScores) -> str:
    return "expected value" if sample.spec.kind == "ordinal" else "predicted number"


def _told(sample: TaskScores) -> tuple[Floats, Floats]:
    """Return probabilities and whether what they are of is true: of class 1, of the class predicted, or of each class
    of each sample of a multilabel task."""
    if sample.spec.kind == "multilabel":
        return sample.probabilities.ravel(), sample.has.ravel().astype(np.float64)
    if sample.spec.kind == "binary":
        return sample.score, sample.labels
    return sample.score, (sample.predicted == sample.classes).astype(np.float64)


def roc(samples: Samples) -> Chart:
    """Draw the ROC curve of each model."""
    chart = plot((0, 1), (0, 1), "false positive rate", "true positive rate", "ROC curve")
    _diagonal(chart.axes)
    for name in MODELS:
        if name in samples:
            false_positives, true_positives, _ = roc_curve(samples[name].labels, samples[name].score)
            _model_line(chart.axes, false_positives, true_positives, name)
    return chart


def _diagonal(axes: Axes) -> None:
    axes.plot(axes.get_xlim(), axes.get_ylim(), color=INK["faint"], linewidth=1, linestyle=(0, (2, 4)))


def _model_line(axes: Axes, x: Floats, y: Floats, model: str) -> None:
    axes.plot(x, y, color=INK[model], linewidth=1.4 if model == "base" else 1.8)


def _dots(axes: Axes, x: Floats, y: Floats, colour: str, radius: float | Floats, alpha: float = 1.0) -> None:
    """Draw dots of a radius in pixels; ``scatter`` takes the area of the square around each."""
    axes.scatter(x, y, s=(2 * np.asarray(radius)) ** 2, color=colour, alpha=alpha, linewidths=0, zorder=2.5)


def reliability(samples: Samples) -> Chart:
    """Draw the observed rate against the predicted one, dots as large as their bin is full."""
    kind = samples["candidate"].spec.kind
    x_label, y_label = {
        "binary": ("predicted P(class 1)", "observed rate"),
        "multilabel": ("predicted P(class)", "observed rate"),
    }.get(kind, ("top probability", "accuracy"))
    chart = plot((0, 1), (0, 1), x_label, y_label, "Reliability diagram")
    _diagonal(chart.axes)
    for name in MODELS:
        if name in samples:
            mean, rate, share = reliability_bins(samples[name])
            _model_line(chart.axes, mean, rate, name)
            _dots(chart.axes, mean, rate, INK[name], 1.6 + 4.4 * np.sqrt(share))
    return chart


def reliability_bins(sample: TaskScores, bins: int = ECE_BINS) -> tuple[Floats, Floats, Floats]:
    """Return each filled bin's mean prediction, observed rate and share of the samples."""
    told, truth = _told(sample)
    place = np.clip(np.ceil(told * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    there = count > 0
    mean = np.bincount(place, told, minlength=bins)[there] / count[there]
    rate = np.bincount(place, truth, minlength=bins)[there] / count[there]
    return mean, rate, count[there] / len(told)


def histogram(sample: TaskScores, bins: int = 30) -> Chart:
    """Draw the scores, split by what they should say: the classes of a binary task, else right and wrong."""
    low, high, (score, truth) = 0.0, 1.0, _told(sample)
    title, y_label = "top probability", "share"
    if sample.spec.kind in ("binary", "multilabel"):
        title, y_label = "P(class 1)" if sample.spec.kind == "binary" else "P(class)", "share of class"
    elif sample.spec.kind in ("ordinal", "regression"):
        low, high, title, truth = float(score.min()), float(score.max()), _numbers(sample), np.ones(len(sample))
    parts = {"negative": truth == 0, "candidate": truth != 0}
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {colour: np.histogram(score[mask], edges)[0] / mask.sum() for colour, mask in parts.items() if mask.any()}
    peak = max(float(share.max()) for share in shares.values())
    chart = plot((float(edges[0]), float(edges[-1])), (0, peak * 1.05), title, y_label, "Score histogram")
    for colour, share in shares.items():
        face = (INK[colour], 0.28)
        chart.axes.stairs(share, edges, fill=True, facecolor=face, edgecolor=INK[colour], linewidth=1.2)
    return chart


def confusion(sample: TaskScores, most: int = 14) -> Chart:
    """Draw the confusion matrix, each row divided by its class's count; the ``most`` commonest classes."""
    words = [word.strip() for word in sample.spec.class_names]
    counts = np.zeros((len(words), len(words)))
    said = sample.predicted >= 0
    np.add.at(counts, (sample.classes[said], sample.predicted[said]), 1)
    total = np.bincount(sample.classes, minlength=len(words))[:, None].astype(np.float64)
    keep = np.sort(np.argsort(-total[:, 0], kind="stable")[:most])
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)[np.ix_(keep, keep)]
    names = [words[i] for i in keep]
    return heat_map(shares, names, names, "Confusion matrix", lambda v: f"{100 * v:.0f}", "true", "predicted")


def agreement(sample: TaskScores, most: int = 600) -> Chart:
    """Draw expected value against label, a sample of the points where there are many."""
    rows = np.linspace(0, len(sample) - 1, min(most, len(sample))).astype(np.int64)
    values = np.asarray(sample.spec.label_values)
    if sample.spec.kind == "regression":  # neither labels nor predictions end where the scale does
        values = np.concatenate([values, sample.labels, sample.score])
    ends, name = (float(values.min()), float(values.max())), _numbers(sample)
    chart = plot(ends, ends, "label", name, f"{name.capitalize()} against label")
    _diagonal(chart.axes)
    _dots(chart.axes, sample.labels[rows], sample.score[rows], INK["candidate"], 2.4, alpha=0.5)
    return chart


def learning_curve(history: Sequence[Mapping[str, Any]], order: Sequence[str], width: int, height: int) -> Chart:
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
    chart = plot((float(steps[0]), float(steps[-1])), (0.0, top), "step", "loss", "Learning curve", width, height)
    for i, (x, y) in enumerate(smooth.values()):
        chart.axes.plot(x, np.minimum(y, top), color=INK[TASKS[i % len(TASKS)]], linewidth=1.2, alpha=0.8)
    chart.axes.plot(steps, np.minimum(smoothed(total), top), color=INK["ink"], linewidth=2)
    return chart


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


def series(history: Sequence[Mapping[str, Any]], key: str, label: str) -> Chart | None:
    """Draw one number of the training log over steps; None where the log lacks it."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    if len(rows) < 2:
        return None
    x, y = np.array(rows, np.float64).T
    chart = plot((float(x[0]), float(x[-1])), (0.0, float(y.max()) * 1.08), "step", "", f"{label} over steps")
    chart.axes.plot(x, y, color=INK["ink"], linewidth=1.8)
    return chart


def scatter(points: Floats, codes: np.ndarray, about: str) -> Chart:
    """Draw points of a plane coloured by code, without numbers on the axes (t-SNE has no units)."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    chart = plane((x0, x1), (y0, y1), about)
    for code in np.unique(codes):
        part = points[codes == code]
        _dots(chart.axes, part[:, 0], part[:, 1], INK[TASKS[int(code) % len(TASKS)]], 2.2, alpha=0.5)
    return chart


def forest(marks: Mapping[str, float | None], interval: tuple[float, float] | None, ends: tuple[float, float]) -> Chart:
    """Draw one task's row of the table: each model's value on a common scale, the candidate with its interval.

    Args:
        marks: value by name: ``candidate``, ``champion``, ``base``, ``best``.
        interval: of the candidate.
        ends: the scale's range, the same in each row.
    """
    about = ", ".join(f"{k} {v:.3f}" for k, v in marks.items() if v is not None)
    chart = plane(ends, (-13, 13), about, 200, 26, (8, 8, 0, 0))
    drawn = chart.axes
    drawn.plot(ends, (0, 0), color=INK["rule"], linewidth=1)
    if (best := marks.get("best")) is not None:
        drawn.plot((best, best), (-8, 8), color=INK["ink"], linewidth=1.6)
    if interval is not None:
        drawn.plot(interval, (0, 0), color=INK["candidate"], linewidth=3, alpha=0.45, solid_capstyle="round")
    for name in MODELS:
        if (value := marks.get(name)) is not None:
            hollow = name == "base"
            drawn.plot(
                value,
                0,
                "o",
                markersize=8.8,
                markerfacecolor=INK["paper" if hollow else name],
                markeredgecolor=INK[name if hollow else "paper"],
                markeredgewidth=2 if hollow else 1.5,
            )
    return chart


def heat_map(
    values: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    about: str,
    form: Callable[[float], str] = "{:.2f}".format,
    row_title: str = "",
    column_title: str = "",
) -> Chart:
    """Draw a matrix as shaded cells with their numbers, darkest at the largest; NaN is left empty.

    Args:
        values: (rows, columns), not negative.
        rows: names, top to bottom.
        columns: names, left to right.
        about: what it shows, for those who hear it.
        form: writes a cell's number.
        row_title: what the rows are.
        column_title: what the columns are.
    """
    rows, columns = [_shown(name, 32) for name in rows], [_shown(name, 22) for name in columns]
    high, wide = 26, max(26, min(64, 240 // max(len(columns), 1)))
    width, height = wide * len(columns), high * len(rows)
    chart = plane((0, width), (height, 0), about, width, height, (0, 0, 0, 0), fitted=True)
    drawn = chart.axes
    drawn.set_axis_on()
    drawn.spines["bottom"].set_visible(False)
    drawn.grid(visible=False)
    drawn.tick_params(top=False, labeltop=True, labelbottom=False, pad=6)
    drawn.xaxis.set_label_position("top")
    drawn.set_xticks(wide * (np.arange(len(columns)) + 0.5), columns)
    if any(6.4 * len(name) > wide for name in columns):
        drawn.set_xticks(drawn.get_xticks(), columns, rotation=45, ha="left", rotation_mode="anchor")
    drawn.set_yticks(high * (np.arange(len(rows)) + 0.5), rows)
    drawn.set_xlabel(column_title, labelpad=7)
    drawn.set_ylabel(row_title)
    peak = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    for i, j in np.argwhere(np.isfinite(values)):
        share = float(values[i, j]) / peak if peak > 0 else 0.0
        _cell(drawn, wide * j, high * i, wide, high, share, form(float(values[i, j])))
    return chart


def _cell(drawn: Axes, x: float, y: float, width: float, height: float, share: float, words: str) -> None:
    """Draw one rounded cell, the more strongly coloured the larger its share of the peak, with its number."""
    face = (INK["candidate"], 0.06 + 0.86 * share)
    rounded = "round,pad=0,rounding_size=3"
    drawn.add_patch(FancyBboxPatch((x + 1, y + 1), width - 2, height - 2, rounded, facecolor=face, edgecolor="none"))
    colour = INK["paper" if share > 0.66 else "ink"]
    drawn.text(x + width / 2, y + height / 2, words, ha="center", va="center_baseline", color=colour)


def _shown(name: str, most: int) -> str:
    """Return a name that XML can hold, on one line and not too long."""
    line = "".join(sign if sign.isprintable() else " " for sign in name)
    return line if len(line) <= most else f"{line[: most - 1]}…"
