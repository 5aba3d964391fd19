from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.stream.cache import CacheFullError, ShardCache

CONTENTS = [bytes([n]) * 50_000 for n in range(12)]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(cache: ShardCache, data: bytes, log: Path | None = None) -> bytes:
    def chunks() -> Iterator[bytes]:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{data[0]}\n")
        for start in range(0, len(data), 10_000):
            yield data[start : start + 10_000]

    with cache.open(sha(data), "tar", len(data), chunks) as file:
        return file.read()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def fill(folder: str, log: str, order: int, rounds: int, max_bytes: int) -> bool:
    cache = ShardCache(Path(folder), max_bytes)
    for _ in range(rounds):
        for data in CONTENTS[::order]:
            if fetch(cache, data, Path(log)) != data:
                return False
    return True


def test_two_processes_filling_one_cache_fetch_each_shard_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        args = [(str(tmp_path / "cache"), str(log), order, 3, 1 << 20) for order in (1, -1)]
        assert all(pool.starmap(fill, args))
    assert sorted(log.read_text().split()) == sorted(str(n) for n in range(12))


def test_two_processes_stay_within_the_bound_and_read_right(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        args = [(str(tmp_path / "cache"), str(tmp_path / "log"), order, 6, 170_000) for order in (1, -1)]
        assert all(pool.starmap(fill, args))
    assert size_of(tmp_path / "cache") <= 170_000


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path / "cache", 150_000), tmp_path / "log"
    for number in (0, 1, 2, 0, 3, 0, 1):
        fetch(cache, CONTENTS[number], log)
    assert log.read_text().split() == ["0", "1", "2", "3", "1"]


def test_what_has_another_digest_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(InputError, match="fetched twice with another"):
        cache.open(sha(b"right"), "tar", 5, lambda: iter([b"wrong"]))
    assert size_of(tmp_path / "cache") == 0
    tries = iter([[b"wro", b"ng"], [b"right"]])
    with cache.open(sha(b"right"), "tar", 5, lambda: iter(next(tries))) as file:
        assert file.read() == b"right"


def test_what_is_larger_than_the_cache_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheFullError, match="50000 bytes do not fit into a cache of 40000"):
        fetch(ShardCache(tmp_path / "cache", 40_000), CONTENTS[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_gives_up_what_is_unused_and_then_says_so(small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", 1 << 30)  # the limit is larger than the disk
    for data in CONTENTS * 2:
        assert fetch(cache, data) == data
    for path in (small_disk / "cache").glob("*.tar"):
        path.unlink()
    (small_disk / "other").write_bytes(b"x" * 220_000)
    with pytest.raises(CacheFullError, match="no room for"):
        fetch(cache, CONTENTS[0])
    assert not list((small_disk / "cache").glob("*.part"))
