"""Packaged studies are sound, sizes are equal, and what is wrong with one is said."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import pytest

from jobs.config_file import PACKAGED
from jobs.study.records import write_records
from jobs.study.trials import SuiteRuns, load_study
from jobs.study_config import StudyConfig
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError

STUDIES = sorted(path.stem for path in (PACKAGED / "study").glob("*.yaml"))
TASK = TaskSpec(name="tone", template="{text}", label_words=(" no", " yes"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_packaged_study_is_a_sound_configuration(name: str) -> None:
    study = load_study(Path(name))
    for suite in study.suites:
        runs = SuiteRuns(study, suite)
        for arm, options in study.arms_of(suite).items():
            config = runs.config(arm, 0.25, 7)
            assert (config.training.learning_rate, config.seed) == (0.25, 7)
            if study.recipes:  # methods are compared, not settings of one
                assert config.adapter.size is not None
            prompts = {task.segments[:1] for task in config.tasks}
            assert (prompts != {()}) == (options.prompt == "task_word")


@pytest.mark.parametrize(
    ("name", "suite"),
    [(name, suite) for name in ("few", "scarce", "standard", "tasks") for suite in load_study(Path(name)).suites],
)
def test_the_arms_of_a_comparison_are_of_equal_size(name: str, suite: str) -> None:
    study = load_study(Path(name))
    runs = SuiteRuns(study, suite)
    for arm in study.arms_of(suite):
        config = runs.config(arm, 1e-3, 0)
        ratio = _size_ratio(config.adapter.model_dump_json(), config.model.model_dump_json(), len(config.tasks))
        assert abs(ratio - 1) <= 0.06, (arm, ratio)


@functools.cache  # many suites have the same arms on as many tasks
def _size_ratio(adapter: str, model: str, num_tasks: int) -> float:
    from pipeline.modeling.adapter import AdapterConfig, adapter_as_trained
    from pipeline.modeling.config import BaseModelConfig

    told = AdapterConfig.model_validate_json(adapter), BaseModelConfig.model_validate_json(model)
    _, sizes = adapter_as_trained(*told, num_tasks)
    assert sizes is not None
    return sizes.trained.ratio


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rates=[0.1,0.01]", "must rise"),
        ("reference=[nobody]", r"reference must name arms, got \['nobody'\]"),
        ("suites=[nowhere]", r"suites must name those of the study, got \['nowhere'\]"),
        ("arms=[lora,dorra]", r"got \['dorra'\]"),
        ("seeds=[]", "seeds"),
        ("bogus=1", "bogus"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_study(Path("smoke"), [override])


def test_an_unknown_study_names_the_packaged_ones() -> None:
    with pytest.raises(InputError, match="scarce, smoke, smollm2, standard"):
        load_study(Path("nothing"))


def test_parts_of_a_study_are_named_on_the_command_line() -> None:
    study = load_study(Path("standard"), ["suites=[ads]", "arms=[lora,mtl_lora]"])
    assert list(study.suites) == ["ads"] and list(study.arms) == ["lora", "mtl_lora"]
    assert (study.reference, study.recipes) == (("lora",), ("mtl_lora",))


def test_an_unknown_key_of_an_arm_is_named(tmp_path: Path) -> None:
    study = load_study(Path("smoke"), ["arms.lora.set={adapter.rr: 3}"])
    with pytest.raises(InputError, match=r"suite offers, arm lora: .*rr"):
        SuiteRuns(study, "offers").config("lora", 1e-3, 0)


def _study(root: Path, **suite: object) -> StudyConfig:
    folder = root / "data" / "one" / "tone"
    folder.mkdir(parents=True)
    for split, count in {"train": 60, "test": 30}.items():
        rows = [{"id": f"{split}{i}", "text": f"{i}", "label": i % 2} for i in range(count)]
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return load_study(Path("smoke"), [f"data_root={root / 'data'}"]).model_copy(
        update={"suites": {"one": load_study(Path("smoke")).suites["offers"].model_copy(update=suite)}}
    )


def _read(folder: Path, split: str) -> dict[str, int]:
    with gzip.open(folder / f"tone/{split}.jsonl.gz", "rt") as lines:
        return {row["id"]: row["label"] for row in map(json.loads, lines)}


def test_the_development_part_is_never_trained_on(tmp_path: Path) -> None:
    folder = write_records(_study(tmp_path), "one", (TASK,), tmp_path / "out")
    train, held, test = (_read(folder, split) for split in ("train", "validation", "test"))
    assert (len(train), len(held), len(test)) == (44, 16, 24)
    assert not set(train) & set(held)


def test_turned_labels_are_of_the_train_records_alone_and_as_many_as_asked(tmp_path: Path) -> None:
    plain = write_records(_study(tmp_path / "a"), "one", (TASK,), tmp_path / "plain")
    study = _study(tmp_path / "b", flipped={"tone": 0.25}, train_samples={"tone": 40})
    turned = write_records(study, "one", (TASK,), tmp_path / "turned")
    before, after = _read(plain, "train"), _read(turned, "train")
    assert len(after) == 40 and sum(before[key] != after[key] for key in after) == 10
    assert [_read(plain, split) for split in ("validation", "test")] == [
        _read(turned, split) for split in ("validation", "test")
    ]


def test_suites_may_be_links_and_a_task_must_stand_once(tmp_path: Path) -> None:
    study = _study(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/one").symlink_to(tmp_path / "data/one")
    linked = study.model_copy(update={"data_root": str(tmp_path / "linked")})
    plain = write_records(study, "one", (TASK,), tmp_path / "plain")
    assert _read(write_records(linked, "one", (TASK,), tmp_path / "out"), "test") == _read(plain, "test")
    (tmp_path / "linked/other").symlink_to(tmp_path / "data/one")
    with pytest.raises(InputError, match=r"task 'tone' must stand once .* got 2"):
        write_records(linked, "one", (TASK,), tmp_path / "again")


def test_too_few_records_are_refused(tmp_path: Path) -> None:
    study = _study(tmp_path).model_copy(update={"samples": load_study(Path("standard")).samples})
    with pytest.raises(InputError, match=r"more than samples.validation = 100 train records, got 60"):
        write_records(study, "one", (TASK,), tmp_path / "out")
