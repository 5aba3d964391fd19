"""The same error at the same step twice ends a run; what another attempt may survive does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.training.failures import forget, repeated


def _raised(kind: type[Exception], words: str) -> Exception:
    try:
        raise kind(words)
    except kind as error:
        return error


def test_the_same_error_at_the_same_step_of_a_rank_is_found_the_second_time(tmp_path: Path) -> None:
    error = IndexError("list index out of range")
    assert repeated(tmp_path, 0, 7, _raised(IndexError, str(error))) is None
    assert repeated(tmp_path, 1, 7, _raised(IndexError, str(error))) is None
    assert repeated(tmp_path, 0, 8, _raised(IndexError, str(error))) is None
    assert repeated(tmp_path, 0, 8, _raised(KeyError, str(error))) is None
    found = repeated(tmp_path, 0, 8, _raised(KeyError, str(error)))
    assert found is not None
    assert "rank 0 failed twice in step 8 with KeyError: 'list index out of range' (test_failures.py:" in found
    loading = [repeated(tmp_path, 0, None, _raised(TypeError, "x")) for _ in range(2)]
    assert loading[0] is None
    assert "twice while loading" in str(loading[1])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OSError, "no space left on device"),
        (ConnectionResetError, "reset"),
        (MemoryError, ""),
        (RuntimeError, "[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        (RuntimeError, "NCCL error: remote process exited"),
        (RuntimeError, "CUDA out of memory"),
    ],
)
def test_what_comes_of_the_outside_is_never_final(tmp_path: Path, kind: type[Exception], words: str) -> None:
    assert [repeated(tmp_path, 0, 7, _raised(kind, words)) for _ in range(3)] == [None, None, None]


def test_another_command_counts_anew(tmp_path: Path) -> None:
    for _ in range(2):
        assert repeated(tmp_path, 0, 7, _raised(KeyError, "x")) is None
        forget(tmp_path)
