"""What is served is what was evaluated: changed files are refused at every door, by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.promotion.integrity import check_files, digests
from pipeline.promotion.provenance import ForeignVersion
from pipeline.promotion.registry import Registry
from pipeline.promotion.versions import RegistryUnavailable
from tests.pipeline.promotion.conftest import add_version, made_from, promote

WEIGHTS = "adapter_model.safetensors"


def stored_file(registry: Registry, number: int, name: str) -> Path:
    return next(Path(urlparse(registry.version(number).source).path).rglob(name))


def overwrite_with_nan(weights: Path) -> None:
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}, weights)


def test_weights_overwritten_after_registration_are_refused_at_every_door(
    store: str, adapter: Path, tmp_path: Path
) -> None:
    registry = Registry("overwritten", store)
    for _ in range(2):
        promote(registry, add_version(registry, adapter))
    third = add_version(registry, adapter)
    for number in (1, third):
        overwrite_with_nan(stored_file(registry, number, WEIGHTS))
    changed = rf"version \d of 'overwritten' .*{WEIGHTS} was changed"
    with pytest.raises(InputError, match=changed):
        promote(registry, third)
    with pytest.raises(InputError, match=changed):
        registry.rollback()
    with pytest.raises(InputError, match=changed):  # as a warm start and the scoring of the champion fetch it
        registry.download(1, tmp_path / "fetched")
    assert registry.champion().number == 2


@pytest.mark.parametrize("name", ["predictor.json", "mtl_lora_config.json", WEIGHTS])
def test_each_file_that_decides_the_answers_is_compared(registry: Registry, tmp_path: Path, name: str) -> None:
    version = registry.version(1)
    folder = registry.download(1, tmp_path / "whole")
    registry.check_files(version, folder)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match=f"{name} was changed"):  # fetched earlier, changed since
        registry.check_files(version, folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is gone"):
        registry.check_files(version, folder)


def test_other_weights_than_were_evaluated_are_not_registered(registry: Registry, adapter: Path) -> None:
    with pytest.raises(InputError, match="must be those that were evaluated"):
        add_version(registry, adapter, adapter_sha256="0" * 64)
    number = add_version(registry, adapter)
    made = registry.version(number).provenance
    assert made.files == digests(adapter)
    assert made.adapter_sha256 == made.files[WEIGHTS]
    assert registry.find(made.identity).number == number
    assert registry.find(made_from(run="other").identity) is None


def test_a_version_of_an_earlier_release_is_compared_by_its_weights_alone(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = registry._client
    client.delete_model_version_tag(registry.name, "1", "files")
    version = registry.version(1)
    assert set(version.files) == {WEIGHTS}
    folder = registry.download(1, tmp_path / "one")
    overwrite_with_nan(folder / WEIGHTS)
    with pytest.raises(InputError, match="was changed"):
        registry.check_files(version, folder)
    client.delete_model_version_tag(registry.name, "2", "files")
    client.delete_model_version_tag(registry.name, "2", "adapter_sha256")
    registry.rollback(2)
    assert "version 2" in (said := capsys.readouterr().err)
    assert "registered without hashes: its files are not compared" in said


def test_files_are_compared_byte_by_byte(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "sub" / "b").write_bytes(b"two")
    known = digests(tmp_path)
    assert list(known) == ["a", "sub/b"]
    check_files(tmp_path, known, "it")
    (tmp_path / "sub" / "b").write_bytes(b"twp")
    with pytest.raises(InputError, match=r"it must have the files it was registered with, sub/b was changed"):
        check_files(tmp_path, known, "it")


def test_a_version_that_something_else_registered_is_told_apart(registry: Registry, tmp_path: Path) -> None:
    client = registry._client
    made = client.create_model_version(registry.name, tmp_path.as_uri(), tags={"run": "../../outside"})
    version = registry.version(int(made.version))
    with pytest.raises(ForeignVersion, match=f"version {made.version} does not: tag"):
        _ = version.provenance
    assert version.adapter_sha256 is None
    with pytest.raises(InputError, match=r"predictor\.json is not there"):
        registry.download(version.number, tmp_path / "fetched")
    with pytest.raises(InputError):
        registry.tasks_of(version)
    with pytest.raises(InputError):
        promote(registry, version.number)
    with pytest.raises(InputError):
        registry.rollback(version.number)
    assert registry.find(registry.version(2).provenance.identity) is not None  # the others are found beside it
    assert registry.champion() is None


def test_a_version_without_its_predictor_s_file_is_refused_by_name(store: str, adapter: Path) -> None:
    registry = Registry("no-predictor", store)
    number = add_version(registry, adapter)
    stored_file(registry, number, "predictor.json").unlink()
    with pytest.raises(InputError, match=r"predictor\.json is not there"):
        promote(registry, number)


def test_tasks_are_read_off_the_files_where_the_tags_do_not_say(registry: Registry) -> None:
    registry._client.delete_model_version_tag(registry.name, "1", "tasks")
    assert registry.version(1).provenance.tasks == ()
    assert registry.tasks_of(registry.version(1)) == registry.tasks_of(registry.version(2)) == ("query_ad", "pick")


def test_a_model_is_not_named_as_a_ledger_or_a_lease(store: str, adapter: Path) -> None:
    for name in ("ads-ledger", "ads-lease"):
        with pytest.raises(InputError, match="must not end in -ledger or -lease"):
            Registry(name, store).register(adapter, run_id="none", provenance=made_from())


def test_an_outage_is_no_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Registry("ads", "http://ads:hunter2@127.0.0.1:9")  # the port of discard: nobody listens
    for ask in (
        lambda: away.version(3),
        lambda: away.version("champion"),
        away.champion,
        lambda: away.lease(30).check(),
    ):
        with pytest.raises(RegistryUnavailable, match="the registry does not answer") as outage:
            ask()
        assert not isinstance(outage.value, InputError)
        assert "hunter2" not in str(outage.value)


def test_files_whose_store_does_not_answer_are_an_outage(registry: Registry, tmp_path: Path) -> None:
    made = registry._client.create_model_version(registry.name, "http://127.0.0.1:9/files", tags=made_from().tags())
    with pytest.raises(RegistryUnavailable, match="the files of version"):
        registry.download(int(made.version), tmp_path)
    shutil.rmtree(tmp_path)
