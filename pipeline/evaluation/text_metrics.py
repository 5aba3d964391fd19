"""Metrics of written answers against the texts that are right, each from 0 to 1 and a function of sample weights.

Exact match and token F1 are those of SQuAD (arXiv 1606.05250), ROUGE-L is rouge-score's, BLEU and chrF are sacrebleu's,
CIDEr-D is :mod:`pipeline.evaluation.cider`. A sample with several right answers takes the best of them; BLEU and CIDEr
have rules of their own. BLEU is of the whole corpus, with counts and lengths summed over samples; all others are means
over samples.

Axes: R replicates, N samples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.cider import cider

Floats = NDArray[np.float64]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"\w+")
_BLEU_ORDER = 4


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: small letters, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    """Return 1 where the text is one of the references, as SQuAD compares them, else 0."""
    return float(normalized(text) in map(normalized, references))


def token_f1(text: str, references: Sequence[str]) -> float:
    """Return the largest harmonic mean of precision and recall of a text's words, as SQuAD counts them."""
    said = normalized(text).split()
    return max(_f1(said, normalized(reference).split()) for reference in references)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    return 2 * (Counter(said) & Counter(right)).total() / (len(said) + len(right))


class _Words:
    """Small letters and digits of any script, where rouge-score's own tokenizer knows those of English alone."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return _WORDS.findall(text.lower())


class WrittenAnswers:
    """The written answers of one task; each metric is computed when it is first asked for.

    Args:
        texts: (N,) what the model wrote.
        references: (N,) the texts that are right, at least one a sample.
    """

    def __init__(self, texts: NDArray[np.object_], references: NDArray[np.object_]) -> None:
        self.texts, self.references = texts, references

    @cached_property
    def exact_match(self) -> Floats:
        """(N,) 1 where a text is one of its references."""
        return self._each(exact_match)

    @cached_property
    def token_f1(self) -> Floats:
        """(N,) F1 of each text's words."""
        return self._each(token_f1)

    @cached_property
    def rouge_l(self) -> Floats:
        """(N,) F-measure of the longest common subsequence of words."""
        from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes two seconds

        scorer = RougeScorer(["rougeL"], tokenizer=_Words())
        return self._each(lambda text, references: scorer.score_multi(list(references), text)["rougeL"].fmeasure)

    @cached_property
    def chrf(self) -> Floats:
        """(N,) chrF of each text, over 100."""
        from sacrebleu.metrics import CHRF

        scorer = CHRF()
        return self._each(lambda text, references: scorer.sentence_score(text, list(references)).score / 100)

    @cached_property
    def cider(self) -> Floats:
        """(N,) CIDEr-D of each text, over 10; words are weighed by these references' own frequencies."""
        return np.array(cider(*([_Words.tokenize(t) for t in self.texts], self._reference_words()))) / 10

    def _reference_words(self) -> list[list[list[str]]]:
        return [[_Words.tokenize(reference) for reference in references] for references in self.references]

    @cached_property
    def bleu_counts(self) -> Floats:
        """(N, 10) Of each text: right n-grams and all, n from 1 to 4; its length and its reference's."""
        from sacrebleu.metrics import BLEU

        scorer = BLEU(max_ngram_order=_BLEU_ORDER)
        found = [
            scorer.corpus_score([text], [[reference] for reference in references])
            for text, references in zip(self.texts, self.references, strict=True)
        ]
        return np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in found], np.float64)

    def _each(self, metric: Callable[[str, Sequence[str]], float]) -> Floats:
        return np.array([metric(t, r) for t, r in zip(self.texts, self.references, strict=True)], np.float64)

    def bleu(self, weights: Floats) -> Floats:
        """Return the corpus BLEU (R,), smoothed as sacrebleu does by default, of samples that stand in the corpus as
        often as their weights say, which are whole numbers in every resample."""
        from sacrebleu.metrics import BLEU

        sums_RK = np.rint(weights @ self.bleu_counts).astype(np.int64)
        n = _BLEU_ORDER
        return np.array(
            [
                BLEU.compute_bleu(row[:n], row[n : 2 * n], row[-2], row[-1], "exp", max_ngram_order=n).score / 100
                for row in sums_RK.tolist()
            ]
        )
