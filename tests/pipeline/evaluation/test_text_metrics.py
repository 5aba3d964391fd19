"""Metrics of written answers against their published definitions, by hand and by the libraries on the whole corpus."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from pipeline.evaluation.cider import cider
from pipeline.evaluation.text_metrics import WrittenAnswers, exact_match, normalized, token_f1

TEXTS = ["the cat sat on the mat", "a dog runs in the green park", "", "birds fly over the sea today"]
REFERENCES = [
    ("the cat is on the mat", "there is a cat on the mat"),
    ("a dog is running in the park",),
    ("nothing",),
    ("birds fly over the sea", "gulls fly over the sea today"),
]


def _objects(values: list) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


ANSWERS = WrittenAnswers(_objects(TEXTS), _objects(REFERENCES))


def test_texts_are_compared_as_squad_does() -> None:
    assert normalized("The  Eiffel-Tower, Paris!") == "eiffeltower paris"
    assert exact_match("the Red.", ["a red"]) == 1.0
    assert exact_match("red one", ["red"]) == 0.0
    # said: red ball on table; right: red ball table: 3 of 4 and 3 of 3
    assert token_f1("a red ball on the table", ["blue", "the red ball table"]) == pytest.approx(6 / 7)
    assert token_f1("", ["red"]) == 0.0
    assert token_f1("the", ["a"]) == 1.0  # nothing is left of either


def test_rouge_l_is_the_longest_common_subsequence_in_any_script() -> None:
    found = WrittenAnswers(_objects(["der grüne Ball", "красный мяч"]), _objects([("ein grüner Ball",), ("мяч",)]))
    assert found.rouge_l.tolist() == pytest.approx([1 / 3, 2 / 3])
    # the cat (is) on the mat: 5 of 6 and 5 of 6
    assert ANSWERS.rouge_l[0] == pytest.approx(5 / 6)


def test_bleu_of_equal_weights_is_sacrebleus_and_weights_are_repetitions() -> None:
    width = max(map(len, REFERENCES))
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(width)]
    expected = BLEU().corpus_score(TEXTS, streams).score / 100
    assert 0 < expected < 1
    assert ANSWERS.bleu(np.ones((1, 4))).tolist() == pytest.approx([expected])
    twice = BLEU().corpus_score([*TEXTS, TEXTS[0]], [[*stream, stream[0]] for stream in streams]).score / 100
    assert ANSWERS.bleu(np.array([[2.0, 1, 1, 1]])).tolist() == pytest.approx([twice])


def test_chrf_is_sacrebleus_of_each_sentence() -> None:
    expected = [CHRF().sentence_score(t, list(r)).score / 100 for t, r in zip(TEXTS, REFERENCES, strict=True)]
    assert ANSWERS.chrf.tolist() == pytest.approx(expected)


def test_cider_is_the_published_formula_by_hand() -> None:
    # Two samples, so each n-gram of one alone weighs log 2, "red" of both nothing.
    references = [[["red", "ball"]], [["red", "sky"]]]
    same, longer = cider([["red", "ball"], ["red", "blue", "sky"]], references)
    # n = 1: the vectors are (red 0, ball log 2): cosine 1; n = 2: the one bigram: cosine 1; no longer ones.
    assert same == pytest.approx(10 * 2 / 4)
    # n = 1: (blue log 2, sky log 2) against (sky log 2): 1 / sqrt 2; n = 2: nothing shared; one word longer.
    assert longer == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)


def test_cider_clips_repeated_words_and_takes_the_mean_over_references() -> None:
    references = [[["ball", "sky"], ["sun"]], [["red"]]]
    found, _ = cider([["ball", "ball"], ["red"]], references)
    # against (ball, sky): min(2, 1) 1 / (2 sqrt 2) in units of log 2, lengths are equal; against (sun): nothing
    assert found == pytest.approx(10 * (1 / (2 * math.sqrt(2))) / 4 / 2)
    assert ANSWERS.cider.max() <= 1.0
