"""Preparation as Ray tasks, on a real local cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.ingestion import prepare
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.mapping import mapper
from tests.jobs.test_cli import ROWS, Run, _configuration, mtl_lora  # noqa: F401 - a fixture
from tests.pipeline.ingestion.test_resume_and_append import SPAM, config_of, content, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LOCAL = RayConfig(address="local")


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    with cluster(LOCAL):
        yield


def test_ray_tasks_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    write_files(tmp_path / "in", files=9, rows=100)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "one", seed=0)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "many", seed=0, mapper=mapper(LOCAL, alone_s=0))
    assert content(tmp_path / "one") == content(tmp_path / "many")


def refuse(number: int) -> int:
    if number == 3:
        raise InputError("number must not be 3, got 3; leave it out")
    return number


def test_an_error_in_a_task_comes_back_as_it_was_raised() -> None:
    found = []
    with pytest.raises(InputError) as caught:
        for number in mapper(LOCAL, alone_s=0)(refuse, range(50)):
            found.append(number)
    assert type(caught.value) is InputError
    assert str(caught.value) == "number must not be 3, got 3; leave it out"
    assert found == [0, 1, 2]


def die_once(place: tuple[Path, int]) -> int:
    folder, number = place
    mark = folder / f"died-{number}"
    if number == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_costs_no_result(tmp_path: Path) -> None:
    assert list(mapper(LOCAL, alone_s=0)(die_once, [(tmp_path, number) for number in range(12)])) == list(range(12))
    assert (tmp_path / "died-5").exists()


def test_bad_records_found_by_a_worker_end_the_command_with_2(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    unknown = mtl_lora(
        "prepare", "--config", _configuration(tmp_path, [*ROWS, {"text_a": "x", "label": 0, "task": "ham"}])
    )
    assert unknown.code == 2, unknown.err
    assert "must be a configured task, got 'ham'" in unknown.err
    assert "Traceback" not in unknown.err
