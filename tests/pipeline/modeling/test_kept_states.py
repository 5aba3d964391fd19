"""States on disk: what comes back is what was kept, or nothing; never more bytes than allowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.modeling.kept_states import KeptStates

HIDDEN = 8
IDENTITY = {"base": "b", "cut": 2}


def _open(root: Path, max_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32, **more: object) -> KeptStates:
    return KeptStates(root, max_bytes, IDENTITY, HIDDEN, dtype, **more)  # type: ignore[arg-type]


def _key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _states(number: int, nodes: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(nodes, HIDDEN, generator=torch.Generator().manual_seed(number)).to(dtype)


def _keep(kept: KeptStates, *numbers: int) -> None:
    kept.keep([_key(n) for n in numbers], [_states(n) for n in numbers])


def _found(kept: KeptStates, *numbers: int) -> list[bool]:
    """Return which numbers are kept, all of them with their bits."""
    found = kept.read([_key(n) for n in numbers])
    assert all(states is None or torch.equal(states, _states(n)) for n, states in zip(numbers, found, strict=True))
    return [states is not None for states in found]


def _held(root: Path) -> int:
    return sum(p.stat().st_size for p in root.glob("*/*") if p.suffix in (".states", ".index"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=10)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_exact_states_come_back_with_their_bits(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, sizes: list[int]
) -> None:
    root = tmp_path_factory.mktemp("kept")
    states = [_states(i, size, dtype) for i, size in enumerate(sizes)]
    keys = [_key(i) for i in range(len(sizes))]
    _open(root, dtype=dtype).keep(keys, states)
    for one, other in zip(states, _open(root, dtype=dtype).read(keys), strict=True):
        assert other is not None
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_int8_is_within_a_254th_of_each_nodes_largest_value_and_the_same_when_read(tmp_path: Path) -> None:
    states = torch.cat([_states(1) * 100, _states(2), torch.zeros(1, HIDDEN)])
    kept = _open(tmp_path, precision="int8")
    (given_back,) = kept.keep([_key(1)], [states])
    (read,) = kept.read([_key(1)])
    assert read is not None
    assert torch.equal(given_back, read)
    assert bool(((read - states).abs() <= states.abs().amax(1, keepdim=True) / 253).all())
    assert _held(tmp_path) < states.numel() * 4


def test_other_models_cuts_and_precisions_share_nothing(tmp_path: Path) -> None:
    _keep(_open(tmp_path), 1)
    assert _found(_open(tmp_path), 1) == [True]
    other = KeptStates(tmp_path, 1 << 20, {**IDENTITY, "cut": 3}, HIDDEN, torch.float32)
    for kept in (other, _open(tmp_path, precision="int8"), _open(tmp_path, dtype=torch.bfloat16)):
        assert kept.read([_key(1)]) == [None]


@pytest.mark.parametrize("place", range(0, 320, 37))
def test_a_damaged_byte_is_noticed_and_the_states_are_kept_anew(tmp_path: Path, place: int) -> None:
    _keep(_open(tmp_path), 1, 2)
    (path,) = tmp_path.glob("*/*.states")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    kept = _open(tmp_path)
    whole = _found(kept, 1, 2)
    assert whole == [place >= 160, place < 160]
    assert kept.damaged == 1
    _keep(kept, 1, 2)
    assert _found(kept, 1, 2) == [True, True]
    assert _found(_open(tmp_path), 1, 2) == [True, True]


@pytest.mark.parametrize("suffix", [".states", ".index"])
@pytest.mark.parametrize("size", [0, 1, 90, 159, 200])
def test_what_a_killed_writer_left_torn_is_computed_anew(tmp_path: Path, suffix: str, size: int) -> None:
    _keep(_open(tmp_path), 1, 2)
    (path,) = tmp_path.glob(f"*/*{suffix}")
    os.truncate(path, min(size, path.stat().st_size))
    kept = _open(tmp_path)
    _found(kept, 1, 2)
    _keep(kept, 1, 2, 3)
    assert _found(kept, 1, 2, 3) == _found(_open(tmp_path), 1, 2, 3) == [True] * 3


@pytest.mark.parametrize("suffix", [".states", ".index"])
def test_a_file_that_is_gone_is_no_error(tmp_path: Path, suffix: str) -> None:
    kept = _open(tmp_path)
    _keep(kept, 1)
    for path in tmp_path.glob(f"*/*{suffix}"):
        path.unlink()
    reader = _open(tmp_path)
    assert _found(reader, 1) == [False]
    _keep(reader, 1, 2)
    assert _found(reader, 1, 2) == [True, True]
    _keep(kept, 3)
    assert _found(kept, 3) == [True]


@settings(deadline=None, max_examples=15)
@given(numbers=st.lists(st.integers(0, 40), max_size=60), max_bytes=st.integers(1, 20_000))
def test_no_more_bytes_are_kept_than_allowed(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], max_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("kept")
    kept = [_open(root, max_bytes), KeptStates(root, max_bytes, {"base": "other"}, HIDDEN, torch.float32)]
    for place, number in enumerate(numbers):
        _found(kept[place % 2], number)
        _keep(kept[place % 2], number, number + 1)
        assert _held(root) <= max_bytes


def test_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    max_bytes = 16 * 160  # ten samples, each a segment of its own
    kept = _open(tmp_path, max_bytes)

    def keep(numbers: range) -> None:
        for number in numbers:
            _keep(kept, number)
            time.sleep(0.01)  # file systems count in ticks

    keep(range(9))
    assert _found(kept, 0) == [True]
    time.sleep(0.01)
    keep(range(9, 13))
    assert _found(_open(tmp_path, max_bytes), *range(5), 12) == [True, False, False, False, True, True]


def test_processes_find_what_others_kept_meanwhile(tmp_path: Path) -> None:
    one, other = _open(tmp_path), _open(tmp_path)
    _keep(one, 1)
    _keep(other, 1, 2)
    assert _found(one, 1, 2) == _found(other, 1, 2) == [True, True]
    assert len(list(tmp_path.glob("*/*.states"))) == 1
    assert _held(tmp_path) == 2 * (5 * HIDDEN * 4 + 80)


def _write_for_ever(root: Path) -> None:
    kept = _open(root, 40_000)
    for number in range(1_000_000):
        _keep(kept, number)


def test_a_killed_writer_holds_no_lock_and_leaves_nothing_false(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for process in writers:
        process.start()
    time.sleep(1.0)
    for process in writers:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    kept = _open(tmp_path, 40_000)
    last = max(n for n, found in enumerate(_found(kept, *range(20_000))) if found)
    assert kept.damaged <= 2
    _keep(kept, last + 30_000)
    assert _found(kept, last + 30_000) == [True]
    assert _held(tmp_path) <= 40_000


def test_a_lock_that_another_holds_costs_a_second_at_most_and_nothing_else(tmp_path: Path) -> None:
    kept = _open(tmp_path)
    _keep(kept, 1)
    with FileLock(tmp_path / ".lock"):
        start = time.monotonic()
        _keep(kept, 2)
        assert time.monotonic() - start < 3
    assert _found(kept, 1, 2) == [True, False]
