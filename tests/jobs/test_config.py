from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from jobs.config import RunConfig, load_config
from pipeline.errors import InputError

TASK = 'template: "{text_a}:"\n    label_words: [" no", " yes"]'


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def _records(folder: Path, tasks: str) -> Path:
    return _write(folder, f"name: t\ndata: {{source: records, root: {folder}}}\ntasks:\n{tasks}")


def test_packaged_configurations_are_valid(tmp_path: Path) -> None:
    for name in ("demo", "ads_real"):
        config = load_config(Path(name), [f"run_root={tmp_path}"])
        assert config.folder == tmp_path / name
        assert config.tracking.uri.endswith(f"{tmp_path}/mlflow.db")
        assert len(config.tasks) == {"demo": 4, "ads_real": 9}[name]


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(Path("ads_real"), [f"run_root={tmp_path}", "data.root=some/where"])
    assert load_config(config.write()) == config
    assert config.data.root == str(Path("some/where").resolve())


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    config = load_config(
        Path("ads_real"),
        [f"run_root={tmp_path}", "tasks.spam.metric=accuracy", "training.max_steps=7", "mixture=temperature"],
    )
    assert {t.name: t.metric for t in config.tasks}["spam"] == "accuracy"
    assert config.training.max_steps == 7
    assert config.mixture.kind == "temperature"


def test_days_are_read_alike_in_a_file_and_in_an_override(tmp_path: Path) -> None:
    path = _write(tmp_path, "name: t\ndata: {windows: {train: [2026-01-05, 2026-01-06]}}\n")
    config = load_config(path, ["data.windows.test=[2026-01-07, 2026-01-07]"])
    assert config.data.windows == {
        "train": (dt.date(2026, 1, 5), dt.date(2026, 1, 6)),
        "test": (dt.date(2026, 1, 7), dt.date(2026, 1, 7)),
    }
    assert load_config(config.write()) == config


def test_places_of_data_are_made_absolute(tmp_path: Path) -> None:
    places = ["manifest=shards", "drift.against=s3://bucket/week-1", "cache.folder=cache"]
    config = load_config(Path("demo"), [f"run_root={tmp_path}", *places])
    assert config.manifest_path == str(Path("shards").resolve())
    assert config.drift.against == "s3://bucket/week-1"
    afar = [f"{key}=https://host/x" for key in ("manifest", "drift.against", "data.root", "model.base")]
    other = load_config(Path("demo"), [f"run_root={tmp_path}", *afar])
    assert {other.manifest, other.drift.against, other.data.root, other.model.base} == {"https://host/x"}
    assert config.cache.folder == str(Path("cache").resolve())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=5", "got 'training.max_step'; did you mean 'max_steps'"),
        ("trainin.max_steps=5", "got 'trainin'; did you mean 'training'"),
        ("training.num_workers=0", "training.num_workers: Input should be greater than or equal to 1, got 0"),
        ("training", "must read key.sub=value, got 'training'"),
        ("tasks.spam.metric=pearson", "metric of a binary task must be one of"),
        ("tasks.spam.label_words=[]", "label_words must list at least 2 words"),
        ("tasks.spam.label_words=[' a',' a']", "label_words must differ"),
        ("name=a/b", "name: String should match pattern"),
        (
            "tasks.spam.kind=binry",
            "tasks.spam.kind: Input should be 'binary', 'multiclass', 'choice', 'ordinal', 'multilabel', 'regression'",
        ),
        ("tasks.spam.knd=binary", "got 'tasks.spam.knd'; did you mean 'kind'"),
        ("tasks.spam.label_words=[no, yes]", "tasks.spam.label_words.0 must be text, got the truth value False: YAML"),
        ("tasks.spam.label_words=[1, 2]", "tasks.spam.label_words.1 must be text, got the number 2; quote it"),
        ("retraining.holdout_day=1", "got 'retraining.holdout_day'; did you mean 'holdout_days'"),
        ("training.validation.every_step=1", "got 'training.validation.every_step'; did you mean 'every_steps'"),
        ("mixture.weigths=2", "got 'mixture.weigths'; did you mean 'weights'"),
        ("mixture={kind: temperature, temprature: 2}", "got 'mixture.temprature'; did you mean 'temperature'"),
        ("mixture={kind: weights, weigths: {}}", "got 'mixture.weigths'; did you mean 'weights'"),
        ("mixture=temprature", "mixture.kind must be one of ['proportional', 'temperature', 'weights', 'loss_driven']"),
        ("data.replay.windw=1", "got 'data.replay.windw'; did you mean 'window'"),
        ("length_grouping.window_step=1", "got 'length_grouping.window_step'; did you mean 'window_steps'"),
        ("drift.thresholds.label_psi.wrn=1", "got 'drift.thresholds.label_psi.wrn'; did you mean 'warn'"),
        ("data.root='${oc.env:NOT_SET_ANYWHERE}'", "an interpolation must have a value"),
        ("data.root='${nme}'", "an interpolation must have a value"),
        ("data.root='\\${name}'", "only a template may hold ${ as it stands"),
    ],
)
def test_bad_override_is_refused_with_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Path("ads_real"), [override])
    assert message in str(caught.value)


def test_missing_file_is_refused_with_the_packaged_names(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"found none at .*nowhere.yaml.*ads, ads_real, ads_weekly, all, .*demo, .*glue, .*reviews",
    ):
        load_config(tmp_path / "nowhere.yaml")


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in which no key .* comes twice"):
        load_config(_records(tmp_path, f"  a:\n    {TASK}\n  a:\n    {TASK}\n"))
    twice = f"  - name: a\n    {TASK}\n  - name: a\n    {TASK}\n"
    with pytest.raises(InputError, match=r"task names must differ, got \['a'\] twice"):
        load_config(_records(tmp_path, twice))


@pytest.mark.parametrize("gates", ["margins: {adz: 0.1}", "gain: [adz]", "retired: [ad]"])
def test_gates_of_tasks_that_are_not_configured_are_refused(tmp_path: Path, gates: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: r\ndata: {source: records, root: x}\ntasks:\n  ad: {template: '{x}', label_words: [' a', ' b']}\n"
        f"promotion: {{gates: {{{gates}}}}}\n"
    )
    with pytest.raises(InputError, match=r"promotion\.gates\.(margins|gain|retired) must name .*'ad"):
        load_config(path)


def test_task_without_label_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task 'a': label_words must list at least 2 words"):
        load_config(_records(tmp_path, '  a:\n    template: "{text_a}:"\n'))


def test_records_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tasks must name at least one task"):
        load_config(_write(tmp_path, f"name: t\ndata: {{source: records, root: {tmp_path}}}\n"))


def test_digest_tells_what_decides_the_adapter(tmp_path: Path) -> None:
    one = load_config(Path("demo"), [f"run_root={tmp_path}"])
    assert one.digest() == load_config(Path("demo"), [f"run_root={tmp_path}", "tracking.experiment=x"]).digest()
    assert one.digest() != load_config(Path("demo"), [f"run_root={tmp_path}", "seed=1"]).digest()
    rates = ("training.mixing_learning_rate=0.1", "training.head_learning_rate=0.1")
    for used in ("training.orthogonality=0.1", *rates, "adapter.mixing_spread=1"):
        assert one.digest() != load_config(Path("demo"), [f"run_root={tmp_path}", used]).digest()


def test_conflict_between_tasks_that_share_nothing_is_refused(tmp_path: Path) -> None:
    asked = [f"run_root={tmp_path}", "training.conflict_steps=5"]
    with pytest.raises(InputError, match="conflict_steps must be null with adapter"):
        load_config(Path("demo"), [*asked, "adapter.method=lora_per_task"])
    assert load_config(Path("demo"), [*asked, "adapter.method=moelora"]).training.conflict_steps == 5


def test_a_dollar_before_a_field_is_a_price(tmp_path: Path) -> None:
    path = _records(tmp_path, '  spam:\n    template: "Price ${text_a}:"\n    label_words: [" no", " yes"]')
    config = load_config(path, [f"run_root={tmp_path}"])
    assert config.tasks[0].template == "Price ${text_a}:"
    assert load_config(config.write()) == config


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml must"):
        load_config(_write(tmp_path, "42"))


def test_a_tracking_uri_of_the_environment_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ads:hidden@host/db")
    config = load_config(Path("demo"), [f"run_root={tmp_path}"])
    assert config.tracking.uri == "postgresql://ads:hidden@host/db"
    assert "hidden" not in config.write().read_text()
    assert config.shown()["tracking"]["uri"] == "postgresql://ads:***@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    assert load_config(config.folder / "config.yaml").tracking.uri == "http://head:5000"
    given = load_config(Path("demo"), [f"run_root={tmp_path}", "tracking.uri=http://other:5000"])
    assert load_config(given.write()).tracking.uri == "http://other:5000"


def test_every_key_of_every_block_is_told_from_its_misspelling(tmp_path: Path) -> None:
    seen, file = [], _records(tmp_path, '  a: {template: "{text}", label_words: [" no", " yes"]}\n')
    for place, model in blocks(RunConfig, ""):
        for key in model.model_fields:
            if len(key) < 4 or place.startswith("mixture"):
                continue
            with pytest.raises(InputError) as caught:
                load_config(file, [f"{place}{key}x=1"])
            assert f"got '{place}{key}x'; did you mean {key!r}?" in str(caught.value)
            seen.append(place)
    assert {"", "training.", "training.validation.", "data.replay.", "retraining.", "length_grouping."} <= set(seen)


def blocks(annotation: Any, place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield each block of the configuration that can be reached by keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield place, annotation
        for key, field in annotation.model_fields.items():
            yield from blocks(field.annotation, f"{place}{key}.")
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from blocks(member, place)


def test_interpolations_resolve_alike_in_files_and_overrides_but_in_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADS_DATA", str(tmp_path / "ads"))
    task = 'template: "Price ${text_a} of ${text_b}:"\n    label_words: [" no", " yes"]'
    text = f"name: t\nrun_root: {tmp_path}\ntasks:\n  a:\n    {task}\ndata: {{source: records, root: "
    in_file = load_config(_write(tmp_path, text + '"${oc.env:ADS_DATA}/${name}"}\n'))
    in_override = load_config(_write(tmp_path, text + ".}\n"), ["data.root=${oc.env:ADS_DATA}/${name}"])
    for config in (in_file, in_override):
        assert config.data.root == str(tmp_path / "ads" / "t")
        assert config.tasks[0].template == "Price ${text_a} of ${text_b}:"
        assert load_config(config.write()) == config
    priced = load_config(_write(tmp_path, text + ".}\n"), ["tasks.a.template='${text_b}:'"])
    assert priced.tasks[0].template == "${text_b}:"


def test_a_task_in_a_list_is_named_in_errors(tmp_path: Path) -> None:
    text = (
        "name: t\ntasks:\n  - {name: ok, template: '{a}:', label_words: [' no', ' yes']}\n  - {name: spam, kind: bin}\n"
    )
    with pytest.raises(InputError, match=r"tasks\.spam\.kind: Input should be") as caught:
        load_config(_write(tmp_path, text))
    assert "tasks.spam.template must be given" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixture.temprature=2", "got 'mixture.temprature'; did you mean 'temperature'"),
        (
            "mixture.temprature=2",
            "mixture.kind must be one of ['proportional', 'temperature', 'weights', 'loss_driven']",
        ),
        ("mixture={kind: weights}", "mixture.weights must be given, got nothing"),
        ("mixture={kind: loss_driven, every: 3}", "got 'mixture.every'; did you mean 'every_steps'"),
    ],
)
def test_keys_of_a_mixture_are_told_by_its_kind(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(_write(tmp_path, "name: t\n"), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("target", ["https://host/shards", "hf://datasets/org/name", "shards"])
def test_shards_are_published_only_where_they_can_be_written(target: str) -> None:
    with pytest.raises(ValidationError, match=r"publish must be a folder in s3://, gs://, az://, abfs://, abfss://"):
        RunConfig(name="x", publish=target)
    assert RunConfig(name="x", publish="gs://bucket/shards").publish == "gs://bucket/shards"


def test_exact_kept_states_leave_a_runs_digest_as_it_is_and_8_bit_ones_do_not() -> None:
    def digest(*settings: str) -> str:
        return load_config(Path("demo"), list(settings)).digest()

    folder = "training.kept_states.folder=states"
    assert digest(folder) == digest("training.kept_states.max_bytes=1000") == digest()
    assert digest(folder, "training.kept_states.precision=int8") != digest()
    assert load_config(Path("demo"), [folder]).training.kept_states.path().is_absolute()  # type: ignore[union-attr]


def test_kept_features_of_images_are_part_of_a_runs_digest_and_not_where_they_are_kept() -> None:
    def digest(*settings: str) -> str:
        return load_config(Path("image_text"), list(settings)).digest()

    assert digest("training.kept_states.folder=states") == digest("training.kept_states.max_bytes=1000") != digest()
