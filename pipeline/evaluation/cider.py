"""CIDEr-D, consensus of a text with several references (Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 5).

The published programs tokenise with Java; here words come tokenised, so nothing else is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_ORDER, _SIGMA = 4, 6.0
_Gram = tuple[str, ...]


def cider(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Return each text's CIDEr-D, from 0 to 10.

    An n-gram's weight is its count times the log of N over the samples in whose references it stands. A text's score is
    the mean over n = 1…4 of ten times the mean over its references of their cosine, the text's weights being clipped
    to the reference's, damped by a Gaussian of the difference in length (σ 6).

    Args:
        texts: words of each of N texts.
        references: for each text the words of its references.
    """
    grams = [[_counts(reference) for reference in each] for each in references]
    frequency = Counter(gram for each in grams for gram in set().union(*each))
    total = math.log(max(len(texts), 1))
    weight = {gram: total - math.log(count) for gram, count in frequency.items()}
    scores = []
    for text, each, counted in zip(texts, references, grams, strict=True):
        said = _vectors(_counts(text), weight, total)
        found = [
            math.exp(-((len(text) - len(reference)) ** 2) / (2 * _SIGMA**2))
            * sum(map(_clipped_cosine, said, _vectors(counts, weight, total)))
            / _ORDER
            for reference, counts in zip(each, counted, strict=True)
        ]
        scores.append(10 * sum(found) / len(found))
    return scores


def _counts(words: Sequence[str]) -> Counter[_Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1))


def _vectors(counts: Counter[_Gram], weight: dict[_Gram, float], unseen: float) -> list[dict[_Gram, float]]:
    """Return the weights of a text's n-grams, one vector for each n."""
    vectors: list[dict[_Gram, float]] = [{} for _ in range(_ORDER)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * weight.get(gram, unseen)
    return vectors


def _clipped_cosine(said: dict[_Gram, float], right: dict[_Gram, float]) -> float:
    norm = math.hypot(*said.values()) * math.hypot(*right.values())
    shared = sum(min(value, right[gram]) * right[gram] for gram, value in said.items() if gram in right)
    return shared / norm if norm else 0.0
