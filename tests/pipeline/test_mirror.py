"""A folder on storage and its working copies: what is changed travels, what is gone goes, the last object says all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.mirror import Mirror, working_folder
from pipeline.storage import filesystem
from tests.pipeline.s3_server import BUCKET, S3Server

FILES = {
    "adapter/adapter.safetensors": b"tensors",
    "adapter/predictor.json": b"{}",
    "shards/manifest.json": b"{}",
    "shards/a-train-000000.tar": b"tar",
    "best": b"step-2",
    "report.html": b"<p>",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Mirror, Mirror]:
    """Two machines' copies of one folder."""
    url = str(tmp_path / "storage" / "run")
    return Mirror(url, tmp_path / "one"), Mirror(url, tmp_path / "two")


def test_what_one_machine_sends_another_fetches(two: tuple[Mirror, Mirror]) -> None:
    one, other = two
    write(one.folder)
    one.push()
    other.pull()
    assert read(other.folder) == FILES
    write(other.folder, {"evaluation.json": b"{1}", "report.html": b"<p>new"})
    (other.folder / "best").unlink()
    other.push()
    one.pull()
    assert read(one.folder) == read(other.folder)
    assert "best" not in read(one.folder)


def test_only_what_changed_travels(two: tuple[Mirror, Mirror], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    write(one.folder)
    one.push()
    other.pull()
    sent: list[str] = []
    monkeypatch.setattr(Mirror, "_sent", lambda self, name: sent.append(name) or ["", 0, 0])
    monkeypatch.setattr(Mirror, "_fetched", lambda self, name: sent.append(name) or ["", 0, 0])
    one.push()
    other.pull()
    assert sent == []
    write(one.folder, {"report.html": b"<p>new"})
    one.push()
    assert sent == ["report.html"]


def test_what_was_changed_here_stays_until_it_is_sent(two: tuple[Mirror, Mirror]) -> None:
    one, _ = two
    write(one.folder)
    one.push()
    write(one.folder, {"report.html": b"<p>of a process that was killed"})
    one.pull()
    assert read(one.folder)["report.html"] == b"<p>of a process that was killed"
    one.push()
    assert Mirror(one.url, one.folder.with_name("third")).fetch("report.html")


def test_a_part_alone_is_sent_and_fetched(two: tuple[Mirror, Mirror]) -> None:
    one, other = two
    write(one.folder)
    one.push("adapter")
    other.pull()
    assert set(read(other.folder)) == {"adapter/adapter.safetensors", "adapter/predictor.json"}
    one.push("report.html")
    assert one.names("") == ["adapter/adapter.safetensors", "adapter/predictor.json", "report.html"]
    (one.folder / "adapter" / "predictor.json").unlink()
    one.push("report.html")
    assert "adapter/predictor.json" in one.names("adapter")


def test_what_says_that_a_folder_is_whole_goes_last_and_is_deleted_first(
    two: tuple[Mirror, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    checkpoint = {
        "checkpoints/step-1/manifest.json": b"m",
        "checkpoints/step-1/state.json": b"s",
        "checkpoints/step-1/optimizer.safetensors": b"o",
        "checkpoints/step-1/adapter/config.json": b"c",
        "checkpoints/step-1/adapter/adapter.safetensors": b"a",
    }
    write(one.folder, checkpoint)
    sent: list[str] = []
    send, remove = Mirror._sent, Mirror.remove
    monkeypatch.setattr(Mirror, "_sent", lambda self, name: (sent.append(name), send(self, name))[1])
    monkeypatch.setattr(Mirror, "remove", lambda self, name: (sent.append(name), remove(self, name))[1])
    one.push()
    names = [name.removeprefix("checkpoints/step-1/") for name in sent]
    assert {"adapter/adapter.safetensors", "optimizer.safetensors"} == set(names[:2])
    assert names[2:] == ["adapter/config.json", "state.json", "manifest.json"]
    sent.clear()
    for name in checkpoint:
        (one.folder / name).unlink()
    one.push()
    assert sent[0] == "checkpoints/step-1/manifest.json"
    assert one.names("") == []


def test_what_is_gone_goes_when_what_takes_its_place_is_there(
    two: tuple[Mirror, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    write(one.folder, {"checkpoints/step-1/manifest.json": b"1"})
    one.push()
    (one.folder / "checkpoints/step-1/manifest.json").unlink()
    write(one.folder, {"checkpoints/step-2/manifest.json": b"2", "checkpoints/best": b"step-2"})
    done: list[str] = []
    send, remove = Mirror._sent, Mirror.remove
    monkeypatch.setattr(Mirror, "_sent", lambda self, name: (done.append(f"+{name}"), send(self, name))[1])
    monkeypatch.setattr(Mirror, "remove", lambda self, name: (done.append(f"-{name}"), remove(self, name))[1])
    one.push()
    assert done == ["+checkpoints/step-2/manifest.json", "+checkpoints/best", "-checkpoints/step-1/manifest.json"]


def test_an_object_that_came_in_part_is_never_taken(
    two: tuple[Mirror, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    write(one.folder)
    one.push()
    fs, _ = filesystem(one.url)
    whole, calls = type(fs).get_file, []

    def cut_off(self: object, source: str, target: str) -> None:
        calls.append(source)
        whole(self, source, target)
        if len(calls) == 1:
            Path(target).write_bytes(Path(target).read_bytes()[:3])

    monkeypatch.setattr(type(fs), "get_file", cut_off)
    assert other.fetch("adapter/adapter.safetensors")
    assert len(calls) == 2
    assert read(other.folder) == {"adapter/adapter.safetensors": b"tensors"}


def test_names_with_dots_travel_when_they_are_asked_for(two: tuple[Mirror, Mirror]) -> None:
    one, other = two
    write(one.folder, {"checkpoints/.stop": b"", ".ray/x": b"1", ".version-3/adapter.safetensors": b"t"})
    one.push()
    assert one.names("") == []
    one.put("checkpoints/.stop")
    assert other.fetch("checkpoints/.stop")
    one.push(".version-3")
    other.pull(".version-3")
    assert (other.folder / ".version-3" / "adapter.safetensors").is_file()
    other.remove("checkpoints/.stop")
    assert not one.fetch("checkpoints/.stop")
    assert not (one.folder / "checkpoints" / ".stop").exists()


def test_a_push_that_was_cut_off_goes_on_where_it_was(
    two: tuple[Mirror, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    write(one.folder)
    send = Mirror._sent

    def fail(self: Mirror, name: str) -> list[object]:
        if name == "shards/manifest.json":
            raise InputError("storage is away")
        return send(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_sent", fail)
        with pytest.raises(InputError, match="away"):
            one.push()
    other.pull()
    assert "shards/manifest.json" not in read(other.folder)
    one.push()
    other.pull()
    assert read(other.folder) == FILES


def test_each_url_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    one, other = working_folder("s3://a/runs"), working_folder("s3://b/runs")
    assert one != other
    assert one.parent == tmp_path / "runs"


def test_a_real_bucket_holds_what_is_sent(tmp_path: Path, s3_server: S3Server) -> None:
    one = Mirror(f"s3://{BUCKET}/mirrored", tmp_path / "one")
    other = Mirror(one.url, tmp_path / "two")
    write(one.folder)
    one.push()
    other.pull()
    assert read(other.folder) == FILES
    (other.folder / "best").unlink()
    write(other.folder, {"report.html": b"<p>new"})
    other.push()
    one.pull()
    assert read(one.folder) == read(other.folder)
    fs, root = filesystem(one.url)
    assert not fs.exists(f"{root}/best")
    assert not other.fetch("best")
