"""What storage refuses or fails at for a while is told apart from a damaged file."""

from __future__ import annotations

import errno
import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.ingestion.records import Unit
from pipeline.ingestion.scan import ScanJob, Scanned, scan_unit
from pipeline.ingestion.sources import SourceFile
from tests.pipeline.made_images import image_bytes

SHAPE = TaskSpec(name="shape", template="{text}:", label_words=(" no", " yes"), image_field="image")
OUTAGE = OSError(errno.EBUSY, "Please reduce your request rate.")
RECORD = json.dumps({"text": "a", "label": 0, "image": "one.png"}).encode()


class Flaky(io.BytesIO):
    error: Exception | None = None

    def read(self, size: int | None = -1) -> bytes:
        if self.error is not None:
            self.error, error = None, self.error
            raise error
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return self.read(0) or super().readline(size)


class Bucket:
    """A bucket in memory; the n-th file opened fails at its first read."""

    def __init__(self, files: dict[str, bytes], error: Exception | None, failing: int) -> None:
        self.files, self.error, self.failing, self.opened = files, error, failing, 0

    def info(self, path: str) -> dict[str, object]:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": len(self.files[path])}

    def open(self, path: str, mode: str) -> io.BytesIO:
        file = Flaky(self.files[path])
        self.opened += 1
        file.error = self.error if self.opened == self.failing else None
        return file


def scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, error: Exception | None
) -> tuple[Scanned, Bucket]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("one.png", image_bytes("PNG"))
    bucket = Bucket({f"b/{name}": data, "b/images.zip": archive.getvalue()}, error, 1)
    for module in ("records", "images"):
        monkeypatch.setattr(f"pipeline.ingestion.{module}.filesystem", lambda url: (bucket, url.removeprefix("s3://")))
    source = SourceFile("shape", "train", f"s3://b/{name}", name, size=len(data))
    job = ScanJob(0, Unit(source, 0), DataConfig(source="records", root="s3://b"), (SHAPE,), tmp_path)
    return scan_unit(job), bucket


@pytest.mark.parametrize("error", [OUTAGE, TimeoutError("no answer"), ConnectionResetError("gone")])
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_records_are_read_again_after_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    data = gzip.compress(RECORD) if name.endswith("gz") else RECORD
    scanned, bucket = scan(tmp_path, monkeypatch, name, data, error)
    assert (scanned.rows, scanned.rejects, bucket.opened) == (1, {}, 3)  # records twice, images once


def test_refused_records_are_said_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="must be readable with the credentials at hand"):
        scan(tmp_path, monkeypatch, "train.jsonl", RECORD, PermissionError("Access Denied"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train.jsonl.gz", gzip.compress(RECORD)[:-9]),
        ("train.jsonl.gz", b"damaged"),
        ("train.parquet", b"PAR1" + b"\x15damaged" * 9 + b"\x20\0\0\0PAR1"),
    ],
    ids=["cut gzip", "no gzip", "damaged parquet"],
)
def test_a_damaged_file_on_s3_stops_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    with pytest.raises(InputError, match="must be a whole file of its kind"):
        scan(tmp_path, monkeypatch, name, data, None)


def test_an_outage_while_an_image_is_read_rejects_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, errors = zipfile.ZipExtFile.read, [OUTAGE]

    def read(file: zipfile.ZipExtFile, size: int = -1) -> bytes:
        if errors:
            raise errors.pop()
        return real(file, size)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    scanned, _ = scan(tmp_path, monkeypatch, "train.jsonl", RECORD, None)
    assert (scanned.rows, scanned.rejects) == (1, {})
