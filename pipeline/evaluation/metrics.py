"""Every metric of a task, each a function of sample weights (see :mod:`pipeline.evaluation.ranking`).

What is undefined is NaN here and becomes ``null`` with :func:`reason` in a report, never 0.5.

Axes: R replicates, N samples, C classes, K bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.ranking import (
    Statistic,
    auc_statistic,
    average_precision_statistic,
    grouped_auc_statistic,
    is_constant,
    pearson_statistic,
    ratio,
    spearman_statistic,
)
from pipeline.evaluation.score_table import Floats, TaskScores
from pipeline.generation import TEXT_METRICS

ECE_BINS = 15
"""Equal-width bins of the expected calibration error (Guo et al. 2017, arXiv 1706.04599, use 15)."""


def statistics(sample: TaskScores) -> dict[str, Statistic]:
    """Return every metric that the task's kind knows, by name."""
    kind = sample.spec.kind
    if kind == "regression":
        error = sample.score - sample.labels
        return {
            "pearson": pearson_statistic(sample.score, sample.labels),
            "spearman": spearman_statistic(sample.score, sample.labels),
            "rmse": root_mean_square(error),
            "mae": mean(np.abs(error)),
        }
    if kind == "multilabel":
        counts = ClassCounts(sample.has, sample.said)
        return {
            "micro_f1": micro_f1(counts),
            "macro_f1": macro_f1(counts),
            "macro_auc": macro_auc(sample),
            "subset_accuracy": accuracy(sample),
            "logloss": logloss(sample),
        }
    if kind == "generation":
        return {name: of_texts(sample, name) for name in sorted(TEXT_METRICS)} | {"logloss": logloss(sample)}
    if sample.spec.is_written:
        return _written(sample)
    known: dict[str, Statistic] = {"accuracy": accuracy(sample), "logloss": logloss(sample)}
    if kind == "ordinal":
        known |= {
            "pearson": pearson_statistic(sample.score, sample.labels),
            "spearman": spearman_statistic(sample.score, sample.labels),
        }
        return known
    known["ece"] = calibration_error(sample)
    if kind == "choice":
        return known | {"exact_match": known["accuracy"]}
    width = sample.probabilities.shape[1]
    counts = ClassCounts(_one_hot(sample.classes, width), _one_hot(sample.predicted, width))
    known |= {
        "macro_f1": macro_f1(counts),
        "matthews": matthews(counts),
        "normalized_entropy": normalized_entropy(sample),
    }
    if kind == "binary":
        positive = sample.labels == 1
        known |= {
            "auc": auc_statistic(positive, sample.score),
            "pr_auc": average_precision_statistic(positive, sample.score),
            "f1": f1(counts),
            "calibration_ratio": calibration_ratio(sample),
            "brier": mean(np.square(sample.score - sample.labels)),
        }
        if sample.groups is not None:
            known["grouped_auc"] = grouped_auc_statistic(positive, sample.score, sample.groups)
    return known


def _written(sample: TaskScores) -> dict[str, Statistic]:
    """Return the metrics of labels that are written: there are no probabilities to judge."""
    known = {"accuracy": accuracy(sample), "answered": mean(sample.predicted >= 0)}
    if sample.spec.kind == "choice":
        return known
    width = sample.probabilities.shape[1]
    counts = ClassCounts(_one_hot(sample.classes, width), _one_hot(sample.predicted, width))
    known["macro_f1"] = macro_f1(counts)
    if sample.spec.kind == "binary":
        known["f1"] = f1(counts)
    # To what the labels have in common with the answers, other texts are one more answer.
    said = np.where(sample.predicted < 0, width, sample.predicted)
    return known | {"matthews": matthews(ClassCounts(_one_hot(sample.classes, width + 1), _one_hot(said, width + 1)))}


def mean(values: Floats | NDArray[np.bool_]) -> Statistic:
    """Return the weighted mean of one number a sample."""
    numbers = values.astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        return ratio(weights @ numbers, weights.sum(axis=1))

    return statistic


def of_texts(sample: TaskScores, name: str) -> Statistic:
    """Return a metric of written answers, computed when it is first asked for."""
    if name == "bleu":
        return sample.answers.bleu
    return lambda weights: mean(getattr(sample.answers, name))(weights)


def accuracy(sample: TaskScores) -> Statistic:
    """Share of samples whose predicted class is the label; for choices and answers this is exact match."""
    return mean(sample.right)


def logloss(sample: TaskScores) -> Statistic:
    """Mean negative natural log of the label's probability, clipped at the float64 epsilon; of a free text that of the
    first right answer, the mean over its tokens."""
    return mean(sample.surprise)


def normalized_entropy(sample: TaskScores) -> Statistic:
    """Log loss divided by the entropy of the label rates: 1 is a model that knows the rates only.

    He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 3.
    """
    one_hot = _one_hot(sample.classes, sample.probabilities.shape[1])

    def statistic(weights: Floats) -> Floats:
        rates = ratio(weights @ one_hot, weights.sum(axis=1, keepdims=True))
        entropy = -(rates * np.log(np.where(rates > 0, rates, 1.0))).sum(axis=1)
        return ratio(ratio(weights @ sample.surprise, weights.sum(axis=1)), entropy)

    return statistic


def calibration_ratio(sample: TaskScores) -> Statistic:
    """Expected positives divided by observed positives (He et al. 2014): 1 is calibrated, above 1 overconfident."""
    features = np.stack([sample.score, sample.labels], axis=1)

    def statistic(weights: Floats) -> Floats:
        expected, observed = (weights @ features).T
        return ratio(expected, observed)

    return statistic


def calibration_error(sample: TaskScores) -> Statistic:
    """Expected calibration error over 15 equal-width bins (Guo et al. 2017, equation 3).

    Binary tasks compare P(class 1) with the rate of class 1, others the top probability with accuracy.
    """
    confidence = sample.score
    truth = sample.labels if sample.spec.kind == "binary" else (sample.predicted == sample.classes).astype(np.float64)
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps = _one_hot(bins, ECE_BINS) * (confidence - truth)[:, None]

    def statistic(weights: Floats) -> Floats:
        return ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))

    return statistic


def _one_hot(classes: np.ndarray, width: int) -> Floats:
    return (classes[:, None] == np.arange(width)).astype(np.float64)


class ClassCounts:
    """Hits, labels and predictions a class, (R, C) each, counted once for all metrics of the same weights.

    Args:
        true: (N, C) whether a sample is of a class.
        said: (N, C) whether it is predicted to be.
    """

    def __init__(self, true: np.ndarray, said: np.ndarray) -> None:
        self._width = true.shape[1]
        true, said = true.astype(np.float64), said.astype(np.float64)
        self._features = np.concatenate([true * said, true, said], axis=1)
        self._last: tuple[Floats, Floats] | None = None

    def __call__(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the three counts."""
        if self._last is None or self._last[0] is not weights:
            self._last = weights, weights @ self._features
        hits, true, said = np.split(self._last[1], [self._width, 2 * self._width], axis=1)
        return hits, true, said


def f1(counts: ClassCounts) -> Statistic:
    """F1 of class 1; undefined where class 1 is neither a label nor a prediction."""

    def statistic(weights: Floats) -> Floats:
        hits, true, said = counts(weights)
        return ratio(2 * hits[:, 1], true[:, 1] + said[:, 1])

    return statistic


def micro_f1(counts: ClassCounts) -> Statistic:
    """F1 over the pairs of a sample and a class; undefined where no pair is a label or a prediction."""

    def statistic(weights: Floats) -> Floats:
        hits, true, said = counts(weights)
        return ratio(2 * hits.sum(axis=1), true.sum(axis=1) + said.sum(axis=1))

    return statistic


def macro_auc(sample: TaskScores) -> Statistic:
    """Unweighted mean of the AUC of a multilabel task's classes, of those that some samples have and some have not."""
    each = [auc_statistic(has, p) for has, p in zip(sample.has.T, sample.probabilities.T, strict=True)]

    def statistic(weights: Floats) -> Floats:
        values = np.stack([auc(weights) for auc in each], axis=1)
        there = ~np.isnan(values)
        return ratio(np.where(there, values, 0).sum(axis=1), there.sum(axis=1).astype(np.float64))

    return statistic


def root_mean_square(error: Floats) -> Statistic:
    """Square root of the weighted mean of the squared errors."""
    square = mean(np.square(error))

    def statistic(weights: Floats) -> Floats:
        return np.sqrt(square(weights))

    return statistic


def macro_f1(counts: ClassCounts) -> Statistic:
    """Unweighted mean of the F1 of the classes that occur as label or prediction."""

    def statistic(weights: Floats) -> Floats:
        hits, true, said = counts(weights)
        each = ratio(2 * hits, true + said)
        there = ~np.isnan(each)
        return ratio(np.where(there, each, 0).sum(axis=1), there.sum(axis=1).astype(np.float64))

    return statistic


def matthews(counts: ClassCounts) -> Statistic:
    """Matthews correlation, its multi-class form R_K (Gorodkin 2004); undefined where labels are all one class."""

    def statistic(weights: Floats) -> Floats:
        hits, true, said = counts(weights)
        n = true.sum(axis=1)
        cov = hits.sum(axis=1) * n - (true * said).sum(axis=1)
        # As sums of k (total - k), so that one class alone gives exactly zero.
        var_true = (true * (n[:, None] - true)).sum(axis=1)
        var_said = (said * (said.sum(axis=1, keepdims=True) - said)).sum(axis=1)
        value = ratio(cov, np.sqrt(var_true * var_said))
        # A model that says one class only is no better than chance; labels of one class say nothing.
        return np.where((var_said == 0) & (var_true > 0), 0.0, value)

    return statistic


def reason(sample: TaskScores, metric: str) -> str:
    """Return, in words, why a metric of this sample is undefined."""
    if not len(sample):
        return "no samples"
    if sample.spec.kind == "multilabel":
        return (
            f"none of the {len(sample)} samples tells a class from the others" if metric == "macro_auc" else _NO_LABEL
        )
    if sample.spec.kind == "regression":
        return _constant(sample, metric)
    if sample.spec.kind == "generation":
        return f"{metric} divides by zero on these {len(sample)} samples"
    classes = np.unique(sample.classes)
    if len(classes) == 1:
        return f"all {len(sample)} labels are class {int(classes[0])}; {metric} needs at least two classes"
    if metric in ("pearson", "spearman"):
        return _constant(sample, metric)
    if metric == "grouped_auc":
        return "no group holds both classes"
    return f"{metric} divides by zero on these {len(sample)} samples"


_NO_LABEL = "no sample has a class and none is predicted"


def _constant(sample: TaskScores, metric: str) -> str:
    side = "predictions" if is_constant(sample.score) else "labels"
    return f"all {len(sample)} {side} are equal; {metric} needs variation"
