"""The packaged suites are whole, name their data's tasks, and their questions differ where they are meant to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.config_views import explained
from jobs.study.interference import offer_questions, review_questions, write_suites
from pipeline.errors import InputError
from pipeline.ingestion import prepare
from pipeline.ingestion.sources import find_sources

DATA = Path(__file__).resolve().parents[3] / "shared/data"
TASKS = {"glue": 8, "commonsense": 7, "ads": 9, "reviews": 5, "all": 29}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not beside the repository")


@needs_data
@pytest.mark.parametrize("suite", TASKS)
def test_a_suite_finds_each_of_its_tasks_from_one_folder(suite: str, tmp_path: Path) -> None:
    config = load_config(Path(suite), [f"data.root={DATA}", f"run_root={tmp_path}"])
    assert len(config.tasks) == TASKS[suite]
    found = {(source.task, source.split) for source in find_sources(config.data, config.tasks)}
    assert found == {(task.name, split) for task in config.tasks for split in ("train", "test")}


@needs_data
def test_every_record_form_of_the_suites_is_ingested(tmp_path: Path) -> None:
    config = load_config(Path("all"), [f"data.root={DATA}", "data.max_samples={train: 8, test: 8}"])
    manifest = prepare(config.data, config.tasks, tmp_path / "shards", seed=0)
    assert {task.name: manifest.samples_of(task.name, "test") for task in manifest.tasks} == {
        task.name: 8 for task in config.tasks
    }


def test_a_task_in_two_folders_is_refused(tmp_path: Path) -> None:
    for suite in ("one", "two"):
        (tmp_path / suite / "cola").mkdir(parents=True)
        (tmp_path / suite / "cola/train.jsonl").write_text('{"text_a": "a", "label": 1}\n')
    tasks = load_config(Path("glue"), [f"data.root={tmp_path}"]).tasks[:1]
    with pytest.raises(InputError, match=r"'cola' must stand in one folder of .*one/cola.*two/cola"):
        find_sources(load_config(Path("glue"), [f"data.root={tmp_path}"]).data, tasks)


def test_a_file_stands_over_those_it_extends(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: [reviews, glue]\nname: mine\ntasks: {cola: {metric: accuracy}}\n")
    (tmp_path / "further.yaml").write_text("extends: mine.yaml\nseed: 3\n")
    config = load_config(tmp_path / "further.yaml", ["data.root=x"])
    metrics = {task.name: task.metric for task in config.tasks}
    assert (config.name, config.seed, config.model.max_length) == ("mine", 3, 192)
    assert len(metrics) == 13 and metrics["cola"] == "accuracy" and metrics["mrpc"] == "f1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: me.yaml\nname: me", "me.yaml → me.yaml"),
        ("extends: 3\nname: me", "a list of them, got 3"),
        ("extends: []\nname: me", r"a list of them, got \[\]"),
        ("extends: nowhere\nname: me", "found none at nowhere"),
        ("extends: ads\nname: me\ntasks: [{name: spam}]", "the same kind of value"),
    ],
)
def test_what_cannot_be_extended_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load_config(tmp_path / "me.yaml")


def test_settings_of_a_base_stand_over_the_file_and_under_overrides(tmp_path: Path) -> None:
    (tmp_path / "general.yaml").write_text(
        "name: general\ndata: {source: synthetic_ads}\nmodel: {num_layers: 2}\n"
        "by_base: {minilm-l6: {model: {num_layers: null}, training: {learning_rate: 0.003}}}\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text("extends: general.yaml\nby_base: {minilm-l6: {training: {max_steps: 7}}}\n")
    other = load_config(path)
    assert (other.model.num_layers, other.training.max_steps) == (2, None)
    encoder = load_config(path, ["model.base=minilm-l6", "training.max_steps=9"])
    assert encoder.model.num_layers is None
    assert (encoder.training.learning_rate, encoder.training.max_steps) == (0.003, 9)
    assert explained(path, ["model.base=minilm-l6"])["training.learning_rate"]["from"] == "file"
    path.write_text("extends: general.yaml\nmodel: {base: minilm-l6}\n")
    assert load_config(path).training.learning_rate == 0.003
    path.write_text("name: general\nby_base: [minilm-l6]\n")
    with pytest.raises(InputError, match="must hold settings by base model"):
        load_config(path)


@pytest.mark.parametrize("name", ["demo", "ads_real", "glue_real", "ads_weekly"])
def test_one_key_gives_the_encoder_what_it_wants_and_leaves_the_language_model_as_it_was(name: str) -> None:
    encoder, other = (load_config(Path(name), ["data.root=x", *key]) for key in (["model.base=minilm-l6"], []))
    assert (encoder.model.num_layers, encoder.model.pooling, encoder.adapter.lora_alpha) == (None, "mean", 32)
    assert encoder.training.learning_rate <= 0.001 < other.training.learning_rate
    assert (other.model.pooling, other.training.task_learning_rate) == ("first", None)
    assert encoder.name == other.name == name


def test_questions_share_their_texts_and_differ_in_their_answers() -> None:
    pair = {
        "id": "1",
        "text_a": "title: x; brand: sony; price: 20.0",
        "text_b": "title: y; brand: sony; price: 10.5",
        "label": 0,
    }
    found = dict(offer_questions([pair, pair | {"text_b": "title: y; brand: sony"}]))
    assert {task: record["label"] for task, record in found.items()} == {
        "same_product": 0,
        "same_brand": 1,
        "first_is_dearer": 1,
    }
    assert len({(record["text_a"], record["text_b"]) for record in found.values()}) == 1
    review = {"id": "7", "text_a": "fine", "label": 0}
    asked = list(review_questions([review], [review]))
    assert [(task, record["label"]) for task, record in asked] == [
        ("is_positive", 0),
        ("is_of_a_book", 1),
        ("is_positive", 0),
        ("is_of_a_book", 0),
    ]


@needs_data
def test_who_does_not_know_the_question_cannot_answer_it(tmp_path: Path) -> None:
    counts = write_suites(DATA, tmp_path)
    assert {name.split("/")[0] for name in counts} == {"offers", "review_questions", "question_kinds"}
    for suite, bound in (("offers", 0.72), ("review_questions", 0.8), ("question_kinds", 0.82)):
        answers: dict[str, list[int]] = {}
        for path in sorted((tmp_path / suite).glob("*/test.jsonl.gz")):
            with gzip.open(path, "rt") as lines:
                for record in map(json.loads, lines):
                    answers.setdefault(record["id"] + record["text_a"], []).append(record["label"])
        best = [max(sum(labels), len(labels) - sum(labels)) / len(labels) for labels in answers.values()]
        assert sum(best) / len(best) < bound
    again = write_suites(DATA, tmp_path / "again")
    assert again == counts
    for path in sorted(tmp_path.glob("offers/*/*.gz")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path)).read_bytes()


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"made from .*offer_match_electronics/train.jsonl.gz, which is not there"):
        write_suites(tmp_path, tmp_path)
