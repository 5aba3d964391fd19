"""Whatever comes in at a door ends in a result or in a typed error, within the folder, in bounded time and memory."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from tests.benchmarks.hostile import SHARES
from tests.hostile import drive as driving
from tests.hostile.drive import Found, Put, drive, own_folder
from tests.hostile.mutations import as_json, mutated_value
from tests.hostile.surfaces import SURFACES

INPUTS = {name: max(share // 110, 350) for name, share in SHARES.items()}
"""Ten thousand together."""


def looked_at(name: str, put: Put, folder: Path, numbers: range) -> Found:
    found = Found()
    for _ in drive(name, put, folder, 1, numbers, found):
        pass
    assert found.inputs == len(numbers)
    return found


@pytest.mark.parametrize("name", SURFACES)
def test_a_mutated_input_gives_a_result_or_a_typed_error(name: str) -> None:
    with own_folder() as folder:
        found = looked_at(name, SURFACES[name](folder), folder, range(40))
    assert found.faults == []
    assert found.refused and found.inputs == found.refused + found.accepted


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", SURFACES)
def test_ten_thousand_mutated_inputs_give_results_or_typed_errors(name: str) -> None:
    assert sum(INPUTS.values()) >= 10_000
    with own_folder() as folder:
        found = looked_at(name, SURFACES[name](folder), folder, range(40, 40 + INPUTS[name]))
    assert found.faults == []
    assert found.refused and found.accepted, "inputs that are all refused, or all taken, try nothing"
    assert found.peak_bytes < driving.MOST_BYTES


def untyped(_: random.Random) -> bool:
    raise KeyError("x")


def silent(_: random.Random) -> bool:
    raise InputError("")


def reads_elsewhere(_: random.Random) -> bool:
    return bool(Path("/etc/hostname").read_bytes())


def writes_elsewhere(_: random.Random) -> bool:
    Path("../elsewhere").write_text("x")
    Path("../elsewhere").unlink()
    return True


def runs_a_program(_: random.Random) -> bool:
    return subprocess.run([sys.executable, "--version"], capture_output=True).returncode == 0


def unpickles(_: random.Random) -> bool:
    return bool(pickle.loads(b"cos\ngetcwd\n(tR."))


def takes_long(_: random.Random) -> bool:
    begun = time.process_time()
    while time.process_time() < begun + 3:
        pass
    return True


def hangs(_: random.Random) -> bool:
    time.sleep(5)
    return True


def takes_much(_: random.Random) -> bool:
    return bool(bytearray(8 << 30))


@pytest.mark.parametrize(
    ("put", "fault"),
    [
        (untyped, "KeyError"),
        (silent, "says nothing"),
        (reads_elsewhere, "open '/etc/hostname'"),
        (writes_elsewhere, "open "),
        (runs_a_program, "started"),
        (unpickles, "unpickled"),
        (takes_long, "longer than"),
        (hangs, "longer than"),
        (takes_much, "MemoryError"),
    ],
)
def test_each_way_to_break_the_law_is_seen(put: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "LONGEST_S", 0.5)
    monkeypatch.setattr(driving, "HANGS_S", 2.0 if put is hangs else 60.0)
    with own_folder() as folder:
        found = looked_at("breaks", put, folder, range(1))
    assert [fault in each for each in found.faults] == [True], found.faults


def test_an_input_follows_from_its_surface_seed_and_number() -> None:
    def inputs() -> list[bytes]:
        made = []
        for number in range(50):
            rng = random.Random(f"x 0 {number}")
            made.append(as_json(rng, mutated_value(rng, {"a": [1, "b", None]})))
        return made

    assert inputs() == inputs()
    assert len(set(inputs())) > 40
