"""Spaces, the configurations that are drawn from them, and which trial is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.config import RunConfig, load_config
from jobs.stages.plan import training_job
from jobs.tune_config import Range, TuneConfig
from jobs.tuning.table import sparkline
from jobs.tuning.trials import Outcome, Search, best_outcome, curve
from pipeline.errors import InputError
from pipeline.stream.mixture import parse_mixture
from tests.jobs.tuning.ground import TUNE, write_ground


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ground(tmp_path_factory.mktemp("ground"))


def _search(path: Path, *overrides: str, **tune: Any) -> Search:
    config = load_config(path, overrides)
    return Search(config.model_copy(update={"tune": TuneConfig.model_validate(TUNE | tune)}))


@given(seed=st.integers(0, 2**31), trial=st.integers(1, 1000))
def test_drawn_values_lie_in_their_ranges_and_come_again(seed: int, trial: int) -> None:
    space = {
        "training.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "training.weight_decay": {"uniform": [0.0, 0.1]},
        "adapter.r": {"integers": [2, 8]},
        "mixture": {"choice": ["proportional", {"kind": "temperature", "temperature": 2.0}]},
    }
    tune = TuneConfig.model_validate({"space": space, "seed": seed})
    drawn = tune.drawn(trial)
    assert drawn == tune.drawn(trial)
    assert drawn["training.learning_rate"] * (1 + 1e-12) >= 1e-4
    assert drawn["training.learning_rate"] <= 1e-2 * (1 + 1e-12)
    assert 0 <= drawn["training.weight_decay"] <= 0.1
    assert drawn["adapter.r"] in range(2, 9)
    assert drawn["mixture"] in space["mixture"]["choice"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "exactly one of choice"),
        ({"choice": [1], "uniform": [0, 1]}, "exactly one of choice"),
        ({"choice": []}, "at least one value"),
        ({"uniform": [1, 1]}, "from low to high"),
        ({"log_uniform": [0, 1]}, "above zero"),
        ({"integers": [4, 2]}, "from low to high"),
        ({"log_unifrom": [1, 2]}, "log_unifrom"),
    ],
)
def test_a_range_that_says_nothing_clear_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Range.model_validate(values)


@pytest.mark.parametrize("key", ["data.root", "name", "tracking.uri", "tune.trials", "learning_rate"])
def test_keys_of_what_all_trials_share_cannot_be_searched(key: str) -> None:
    with pytest.raises(ValidationError, match="all trials share their shards"):
        TuneConfig.model_validate({"space": {key: {"choice": [1, 2]}}})


@pytest.mark.parametrize(
    "key", ["training.validation", "training.validation.samples_per_task", "training.num_workers", "training"]
)
def test_what_judges_trials_and_how_many_ranks_they_have_cannot_be_searched(key: str) -> None:
    with pytest.raises(ValidationError, match=r"must leave training\..* alone, since"):
        TuneConfig.model_validate({"space": {key: {"choice": [1, 2]}}})


@pytest.mark.parametrize(
    ("mixture", "key", "values", "place"),
    [
        (None, "training.learning_rate", {"log_uniform": [1e-4, 1e-2]}, "training.learning_rate"),
        (None, "training.task_learning_rate", {"log_uniform": [1e-4, 1e-2]}, "training.task_learning_rate"),
        (None, "training.mixing_learning_rate", {"uniform": [1e-4, 1e-2]}, "training.mixing_learning_rate"),
        (None, "training.task_weights.tone", {"uniform": [0.5, 2.0]}, "training.task_weights.tone"),
        (None, "adapter.r", {"integers": [2, 16]}, "adapter.r"),
        (None, "adapter.lora_alpha", {"choice": [8, 32]}, "adapter.lora_alpha"),
        (None, "adapter.temperature", {"log_uniform": [0.05, 1.0]}, "adapter.temperature"),
        (None, "adapter.temperature_start", {"uniform": [0.5, 1.0]}, "adapter.temperature_start"),
        (None, "adapter.mixing_spread", {"uniform": [0.1, 1.0]}, "adapter.mixing_spread"),
        (None, "mixture", {"choice": ["temperature", {"kind": "weights", "weights": {"tone": 1, "size": 3}}]}, ""),
        ({"kind": "temperature"}, "mixture.temperature", {"uniform": [1.0, 4.0]}, "mixture.temperature"),
        (
            {"kind": "weights", "weights": {"tone": 1, "size": 1}},
            "mixture.weights.tone",
            {"log_uniform": [0.25, 4.0]},
            "mixture.weights.tone",
        ),
        ({"kind": "loss_driven", "every_steps": 4}, "mixture.alpha", {"uniform": [0.5, 1.5]}, "mixture.alpha"),
        (None, "tasks.tone.class_weights", {"choice": [{"yes": 2.0}, {"yes": 3.0}]}, ""),
        (None, "model.num_layers", {"integers": [1, 4]}, "base.num_layers"),
        (None, "seed", {"integers": [1, 99]}, "seed"),
    ],
)
def test_rates_ranks_temperatures_and_mixtures_reach_what_a_trial_trains(
    path: Path, mixture: dict[str, Any] | None, key: str, values: dict[str, Any], place: str
) -> None:
    search = _search(path, space={key: values})
    if mixture is not None:
        search = Search(search.config.model_copy(update={"mixture": parse_mixture(mixture)}))
    for trial in (1, 2):
        drawn = search.tune.drawn(trial)[key]
        job = training_job(search.trial(trial))
        if key == "mixture":
            assert job.mixture == parse_mixture(drawn)
        elif key.startswith("tasks."):
            assert job.tasks[0].class_weights == drawn
        else:
            assert _found(job, place) == drawn
        assert job.manifest_path == str(search.config.manifest_path)


def _found(job: Any, place: str) -> Any:
    for part in place.split("."):
        job = job[part] if isinstance(job, dict) else getattr(job, part)
    return job


@pytest.mark.parametrize("key", ["template", "label_words", "label_field", "label_map", "columns", "metric"])
def test_a_task_is_asked_in_all_trials_as_in_the_shards_that_they_share(path: Path, key: str) -> None:
    values = {
        "template": "{text} is:",
        "label_words": [" never", " always"],
        "label_field": "answer",
        "label_map": {"0": 1, "1": 0},
        "columns": {"text": "title"},
        "metric": "accuracy",
    }
    with pytest.raises(InputError, match=rf"tasks\.tone\.{key}.*search once for each way of asking"):
        _search(path, space={f"tasks.tone.{key}": {"choice": [values[key]]}}).trials()


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"training.learning_rat": {"choice": [1e-3]}}, "learning_rat"),
        ({"training.learning_rate": {"choice": [1e-3, -1.0]}}, "learning_rate"),
        ({"adapter.rank.r": {"choice": [4]}}, "is no section"),
        ({"tasks.tine.weight": {"choice": [1.0]}}, "is no section"),
        ({"mixture.temperature": {"uniform": [1.0, 4.0]}}, "temperature"),
    ],
)
def test_wrong_keys_and_values_are_refused_before_any_work(path: Path, space: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _search(path, space=space).trials()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tune=null"], "needs a section tune"),
        (["training.validation=null"], "set training.validation.every_steps"),
        (["training.validation.split=test"], "must not be the split of the evaluation"),
        (["tune.metric=tine"], "tune.metric must be one of"),
    ],
)
def test_a_search_without_a_judge_is_refused(path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Search(load_config(path, overrides)).trials()


def test_the_first_trial_is_the_configuration_as_it_stands(path: Path) -> None:
    search = _search(path)
    first, asked = (config.training.model_dump() for config in (search.trial(0), search.config))
    assert {key for key in asked if first[key] != asked[key]} == {"keep_checkpoints"}
    assert search.best(0).training == search.config.training
    assert search.values(0) == {"training.learning_rate": asked["learning_rate"], "adapter.r": 4}
    assert search.values(1) == search.tune.drawn(1)
    assert search.trial(0).adapter == search.config.adapter


def test_a_trial_goes_on_from_its_last_measurement_and_what_it_recommends_trains_as_it_did(path: Path) -> None:
    search = _search(path, "training.checkpoint_steps=100", "training.num_workers=2", "training.min_workers=1")
    trial, best = search.trial(1).training, search.best(1).training
    assert trial.checkpoint_steps == search.config.training.validation.every_steps  # type: ignore[union-attr]
    assert (trial.num_workers, best.num_workers, best.min_workers) == (1, 1, None)
    assert best.checkpoint_steps == 100


def test_trials_share_the_shards_and_differ_in_folder_and_values(path: Path) -> None:
    search = _search(path)
    trials = search.trials()
    assert [trial.name for trial in trials] == [f"t-tune-{number:03d}" for number in range(4)]
    assert len({trial.training.learning_rate for trial in trials}) == 4
    assert {trial.manifest_path for trial in trials} == {str(search.config.manifest_path)}
    assert len({trial.folder for trial in trials}) == 4


def test_more_trials_keep_the_search_and_another_space_does_not(path: Path) -> None:
    search, more = _search(path), _search(path, trials=9)
    assert search.identity == more.identity
    assert search.trials() == more.trials()[:4]
    assert _search(path, seed=1).identity != search.identity


def test_the_best_configuration_is_whole(path: Path, tmp_path: Path) -> None:
    search = _search(path)
    file = tmp_path / "best.yaml"
    file.write_text(search.best(2).as_yaml())
    assert load_config(file) == search.best(2)
    assert RunConfig.model_validate(yaml.safe_load(file.read_text())).digest() == search.trial(2).digest()


def test_the_best_trial_did_all_its_steps_and_keeps_its_level_over_two_measurements() -> None:
    rows = [
        (0, "finished", [0.5, 0.6, 0.6]),
        (1, "stopped", [0.8]),
        (2, "failed", [0.9, 0.9]),
        (3, "finished", [0.7, 0.3, 0.3]),  # one lucky measurement
        (4, "finished", [0.6, 0.6]),
    ]
    outcomes = [Outcome(n, {}, state, list(enumerate(values))) for n, state, values in rows]
    assert [outcome.best for outcome in outcomes] == pytest.approx([0.6, 0.8, 0.9, 0.5, 0.6])
    assert best_outcome(outcomes).number == 0
    assert best_outcome(outcomes[1:3]).number == 1
    with pytest.raises(InputError, match="at least one trial must be measured"):
        best_outcome(outcomes[2:3])
    assert Outcome(0, {}, "failed", []).best is None


def test_a_curve_holds_what_was_measured() -> None:
    history = [{"step": 1}, {"step": 2, "validation": {"macro": 0.5, "tone": 0.4}}]
    assert curve(history, "macro") == [(2, 0.5)]
    assert curve(history, "tone") == [(2, 0.4)]


def test_a_sparkline_spans_both_ends() -> None:
    assert sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert sparkline([0.3, 0.3], 0.3, 0.3) == "▁▁"
