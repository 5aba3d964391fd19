"""From written answers to the report, the comparison and the gates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from pipeline.contracts import Comparison, Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.kept_answers import KeptAnswers, ScoredChunk
from pipeline.evaluation.metrics import statistics
from pipeline.evaluation.predict import score_table
from pipeline.evaluation.score_table import by_task, read_scores, write_scores
from pipeline.evaluation.summary import summarize
from pipeline.promotion.evidence import Evidence, Opponent
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.policy import decide
from pipeline.report.examples import examples

COLOUR = TaskSpec(name="colour", kind="generation", template="{text}:")
ASKED = TaskSpec(name="asked", template="{text}:", label_words=(" no", " yes"), answer_by="generation")
SPAM = TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes"))
TASKS = (COLOUR, ASKED, SPAM)
COLOURS = ("red", "dark blue", "light green", "grey")
NUM = 120


def _frame(error: float, seed: int) -> pd.DataFrame:
    """Return the scores of a model that writes something else in a share of the samples."""
    rng = np.random.default_rng(seed)
    samples, probabilities, texts = [], [], []
    for i in range(NUM):
        for task in TASKS:
            is_wrong, colour, label = rng.random() < error, COLOURS[i % 4], i % 2
            answers = (f"it is a {colour} ball", f"a {colour} one") if task is COLOUR else ()
            samples.append(
                Sample(key=f"{i:03d}", task=task.name, fields={}, label=label * (task is not COLOUR), answers=answers)
            )
            said = 1 - label if is_wrong else label
            if task is COLOUR:
                texts.append(f"one {COLOURS[(i + 1) % 4]} thing of it all" if is_wrong else f"It is a {colour} ball.")
                probabilities.append(np.array([0.2]))
            elif task is ASKED:
                texts.append("perhaps" if is_wrong else ("no", "yes")[label])
                probabilities.append(np.zeros(2) if is_wrong else np.eye(2)[label])
            else:
                texts.append(None)
                probabilities.append(np.eye(2)[said] * 0.8 + 0.1)
    return score_table(samples, probabilities, texts)  # fmt: skip


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return _frame(0.2, seed=0)


def test_scores_come_back_from_their_file_as_they_were(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", frame)
    found, whole = (by_task(f, TASKS)["colour"] for f in (read_scores(tmp_path / "scores.parquet"), frame))
    assert found.texts is not None and found.texts.tolist() == whole.texts.tolist()
    assert found.answers.references.tolist() == whole.answers.references.tolist()
    assert found.answers.references[0] == ("it is a red ball", "a red one")


def test_tables_without_written_answers_have_the_columns_that_they_always_had(frame: pd.DataFrame) -> None:
    samples = [Sample(key="a", task="spam", fields={}, label=1)]
    assert list(score_table(samples, [np.array([0.5, 0.5])], [None]).columns) == [
        "key",
        "task",
        "label",
        "scores",
        "group",
    ]
    with pytest.raises(InputError, match=r"must have \['text', 'references'\]"):
        by_task(frame.drop(columns=["text", "references"]), TASKS)


def test_every_metric_has_its_value_and_interval(frame: pd.DataFrame) -> None:
    report = summarize(frame, TASKS, model="m", data={}, replicates=200)
    colour = report.tasks["colour"]
    right = np.mean([text.startswith("It") for text in frame[frame.task == "colour"].text])
    assert colour.metric == "token_f1" and colour.n == NUM
    assert colour.more["exact_match"] == pytest.approx(right)
    assert colour.logloss == pytest.approx(-np.log(0.2))
    assert {"exact_match", "token_f1", "rouge_l", "bleu", "chrf", "cider"} <= colour.more.keys()
    for name in ("exact_match", "token_f1", "rouge_l", "bleu", "chrf", "cider"):
        value, interval = colour.more[name], colour.intervals[name]
        assert value is not None and interval is not None
        assert 0 <= interval[0] <= value <= interval[1] <= 1
    assert report.macro.value is not None and report.macro.ci95 is not None


def test_a_label_written_as_no_label_word_is_wrong_and_counted(frame: pd.DataFrame) -> None:
    asked = summarize(frame, TASKS, model="m", data={}, replicates=50).tasks["asked"]
    right = np.mean(frame[frame.task == "asked"].text != "perhaps")
    assert (asked.accuracy, asked.more["answered"]) == (pytest.approx(right), pytest.approx(right))
    assert asked.auc is None and asked.ece is None and asked.logloss is None
    assert "accuracy" in asked.intervals


def test_other_texts_are_an_answer_of_their_own_to_the_correlation(frame: pd.DataFrame) -> None:
    samples = by_task(frame, TASKS)["asked"]
    classes, said = samples.classes, samples.predicted
    assert (said == -1).any()
    found = statistics(samples)["matthews"](np.ones((1, NUM)))
    assert found.tolist() == pytest.approx([matthews_corrcoef(classes, said)])
    f1 = statistics(samples)["macro_f1"](np.ones((1, NUM)))
    assert f1.tolist() == pytest.approx([f1_score(classes, said, labels=[0, 1], average="macro")])


def _compared(one: pd.DataFrame, other: pd.DataFrame) -> Comparison:
    return compare(one, other, TASKS, candidate_name="a", reference_name="b", data={}, replicates=200)


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "bleu", "cider"])
def test_two_models_texts_are_compared_in_pairs(metric: str) -> None:
    specs = (COLOUR.model_copy(update={"metric": metric}), ASKED, SPAM)
    good, bad = _frame(0.1, seed=1), _frame(0.6, seed=2)
    found = compare(good, bad, specs, candidate_name="a", reference_name="b", data={}, replicates=200).tasks["colour"]
    assert found.metric == metric and found.verdict == "better"
    again = compare(good, good, specs, candidate_name="a", reference_name="b", data={}, replicates=200).tasks["colour"]
    assert (again.difference, again.verdict) == (0.0, "no difference shown")


def test_a_label_that_is_written_is_compared_with_the_same_one_scored(frame: pd.DataFrame) -> None:
    rng = np.random.default_rng(5)
    written = frame[frame.task == "asked"].reset_index(drop=True)
    scored = written.drop(columns=["text", "references"])
    scored["scores"] = [np.array([0.9, 0.1] if rng.random() < 0.5 else [0.1, 0.9]) for _ in range(NUM)]
    for spec in (ASKED, SPAM.model_copy(update={"name": "asked", "metric": "accuracy"})):
        names = {"candidate_name": "written", "reference_name": "scored"}
        found = compare(written, scored, [spec], **names, data={}, replicates=50).tasks["asked"]
        assert (found.metric, found.verdict) == ("accuracy", "better")
        assert found.candidate == pytest.approx(np.mean(written.text != "perhaps"))


def test_other_references_are_another_holdout(frame: pd.DataFrame) -> None:
    other = frame.copy()
    other["references"] = [["purple"] if each is not None else None for each in other["references"]]
    with pytest.raises(InputError, match="same samples with the same labels"):
        _compared(frame, other)


def test_the_gates_take_a_better_writer_and_hold_back_a_worse_one() -> None:
    frames = {"good": _frame(0.1, seed=1), "bad": _frame(0.6, seed=2), "base": _frame(0.9, seed=3)}
    reports = {name: summarize(f, TASKS, model=name, data={}, replicates=200) for name, f in frames.items()}

    def decided(candidate: str, champion: str) -> str:
        evidence = Evidence(
            base=Opponent("base", reports["base"], _compared(frames[candidate], frames["base"])),
            champion=Opponent("1", reports[champion], _compared(frames[candidate], frames[champion])),
        )
        gates = GatesConfig(max_ece=0.5, min_samples=10)
        return decide(reports[candidate], evidence, gates).tasks["colour"]

    assert "intervals apart" in decided("good", "bad")
    assert decided("bad", "good").startswith("worse than the champion")


def test_examples_are_the_best_the_worst_and_the_changed_each_once(frame: pd.DataFrame) -> None:
    mine, base = (by_task(f, TASKS)["colour"] for f in (frame, _frame(0.9, seed=3)))
    shown, metric = examples(mine, base, {("colour", "000"): "what colour?"})
    assert metric == "token_f1"
    assert [e.sort for e in shown] == ["best"] * 3 + ["worst"] * 3 + ["changed"] * 4
    assert len({e.key for e in shown}) == 10
    assert shown[0].value == 1.0 and shown[3].value == min(mine.answers.token_f1)
    assert all(e.base_value is not None and abs(e.value - e.base_value) > 0 for e in shown[6:])
    alone, _ = examples(mine, None, {})
    assert [e.base_text for e in alone] == [None] * 6


def test_kept_answers_come_back_bit_for_bit_and_only_to_their_own_model(tmp_path: Path) -> None:
    samples = [Sample(key=k, task="colour", fields={}, label=0, answers=("red",)) for k in "ab"]
    chunk = ScoredChunk(
        [np.array([1 / 3]), np.array([0.1, 1e-300])],
        ["ré\\nd", None],
        {("colour", "a"): np.array([0.1, 1 / 3], np.float32)},
    )
    kept = KeptAnswers(tmp_path / "answers", "one")
    assert kept.find(0, samples) is None
    kept.keep(0, samples, chunk)
    found = KeptAnswers(tmp_path / "answers", "one").find(0, samples)
    assert found is not None and found.texts == chunk.texts
    assert all(np.array_equal(a, b) for a, b in zip(found.probabilities, chunk.probabilities, strict=True))
    assert found.states["colour", "a"].tobytes() == chunk.states["colour", "a"].tobytes()
    assert kept.find(0, samples[:1]) is None  # other samples
    assert KeptAnswers(tmp_path / "answers", "two").find(0, samples) is None
    assert KeptAnswers(tmp_path / "answers", "one").find(0, samples) is None  # gone with the other model
    kept.remove()
    assert not (tmp_path / "answers").exists()
