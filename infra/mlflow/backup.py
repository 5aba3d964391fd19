"""What a stack holds, written into a folder and brought back: the database's dump, and the bucket by content.

The database is dumped first and the bucket copied after it. A client uploads a version's files before it registers
them, and nothing here deletes any: so whatever the dump points at is in the bucket when the copy begins. The other way
round, a version registered in between would point at files that the copy lacks. What the copy has and the dump does not
know does no harm. Run no ``mlflow gc`` meanwhile. A restore goes the other way: files first, then what points at them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.mlflow import services
from infra.mlflow.settings import BUCKET, Settings
from pipeline.errors import InputError

SCHEMA = 1
"""Of ``manifest.json``: bytes and sha256 of the dump, and of each object by its key."""
MANIFEST, DUMP, OBJECTS = "manifest.json", "database.dump", "objects"
_CHUNK = 1 << 20


def migrate(settings: Settings) -> tuple[str, str]:
    """Bring the database's schema to the installed MLflow's version; return the revisions before and after.

    Raises:
        InputError: the tracking server runs, the database does not, or MLflow cannot upgrade it.
    """
    if services.mlflow_answers(settings):
        raise InputError("the tracking server must not run while its schema changes; make a backup, then: stop")
    services.start_postgres(settings)
    before = services.revision(settings)
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "db", "upgrade", settings.database_uri],
        env=settings.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"MLflow must upgrade its database, it ended with {done.returncode}: {done.stderr[-1500:]}")
    return before, services.revision(settings)


def backup(settings: Settings, folder: Path) -> str:
    """Write a running stack into a new folder, which is there whole or not at all; return what it holds, in words.

    Args:
        settings: of a stack whose PostgreSQL and S3 answer, by whatever they were started. MLflow may go on serving.
        folder: must not exist.

    Raises:
        InputError: it exists, a server does not answer, or the dump failed.
    """
    folder = folder.absolute()
    if folder.exists():
        raise InputError(f"a backup must get a folder of its own, {folder} exists; name another")
    for name in ("postgres", "s3"):
        if not services.ANSWERS[name](settings):
            raise InputError(f"{name} must answer, it does not; start --data {settings.data}")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a backup that was cut off
    (partial / OBJECTS).mkdir(parents=True, mode=0o700)
    partial.chmod(0o700)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    _dump(settings, partial / DUMP)
    manifest = {
        "schema": SCHEMA,
        "made": made,
        "revision": services.revision(settings),
        "database": _seen(partial / DUMP),
        "objects": _copy_bucket(settings, partial / OBJECTS),
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(folder)
    _sync(folder.parent)
    return _words(manifest)


def restore(settings: Settings, folder: Path) -> str:
    """Fill an empty stack from a backup whose every hash is right; return what it holds, in words.

    PostgreSQL and S3 are started where they do not answer. What a restore of the same backup left that was cut off
    does not count.

    Raises:
        InputError: the backup is damaged or of another version, or the stack holds something.
    """
    manifest = read_backup(folder)
    services.start_postgres(settings)
    services.start_s3(settings)
    tables = services.tables(settings)
    if tables:
        raise InputError(
            f"a backup is restored into an empty stack, the database of {settings.data} has {tables} tables; "
            "take a new folder, and restore before its first start"
        )
    foreign = [key for key in _keys(settings) if key not in manifest["objects"]]
    if foreign:
        raise InputError(
            f"a backup is restored into an empty stack, the bucket of {settings.data} holds {len(foreign)} other "
            f"objects, {foreign[0]} among them; take a new folder"
        )
    client = services.s3_client(settings)
    for key, seen in manifest["objects"].items():
        client.upload_file(str(folder / OBJECTS / seen["sha256"]), BUCKET, key)
    _postgres(settings, "pg_restore", "--single-transaction", "--no-owner", "--dbname", BUCKET, str(folder / DUMP))
    return _words(manifest)


def read_backup(folder: Path) -> dict[str, Any]:
    """Return a backup's manifest, every file compared with it.

    Raises:
        InputError: a file is missing, differs, or the manifest's version is not known.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} must be a backup, it has no {MANIFEST}; one that was cut off has none")
    manifest = json.loads(path.read_text())
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{path} must have schema {SCHEMA}, got {manifest.get('schema')!r}; take the code that made it"
        )
    for file, seen in [
        (folder / DUMP, manifest["database"]),
        *((folder / OBJECTS / seen["sha256"], seen) for seen in manifest["objects"].values()),
    ]:
        if not file.is_file() or _seen(file) != seen:
            raise InputError(f"{file} must be as it was written, it is damaged or gone; take another backup")
    return dict(manifest)


def _dump(settings: Settings, path: Path) -> None:
    _postgres(settings, "pg_dump", "--format=custom", "--no-owner", "--file", str(path), BUCKET)


def _copy_bucket(settings: Settings, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy each object into a file named by its sha256; return both by key."""
    client, objects = services.s3_client(settings), {}
    for key in _keys(settings):
        try:
            body = client.get_object(Bucket=BUCKET, Key=key)["Body"]
        except client.exceptions.NoSuchKey:
            raise InputError(f"nothing may be deleted while a backup is made, {key} was; make it again") from None
        partial, digest = folder / "partial", hashlib.sha256()
        with partial.open("wb") as file:
            for chunk in iter(lambda: body.read(_CHUNK), b""):  # noqa: B023 - read within the turn
                digest.update(chunk)
                file.write(chunk)
        objects[key] = {"bytes": partial.stat().st_size, "sha256": digest.hexdigest()}
        partial.rename(folder / digest.hexdigest())
    return objects


def _keys(settings: Settings) -> Iterator[str]:
    for page in services.s3_client(settings).get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        yield from (found["Key"] for found in page.get("Contents", ()) if not found["Key"].endswith("/"))


def _postgres(settings: Settings, program: str, *arguments: str) -> None:
    command = [str(services.postgres_program(program)), "--host=127.0.0.1", f"--port={settings.postgres_port}"]
    command += [f"--username={BUCKET}", "--no-password", *arguments]
    done = subprocess.run(command, env=settings.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{program} must succeed, it ended with {done.returncode}: {done.stderr[-1500:]}")


def _seen(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _words(manifest: Mapping[str, Any]) -> str:
    total = sum(seen["bytes"] for seen in manifest["objects"].values()) + manifest["database"]["bytes"]
    return f"the database and {len(manifest['objects'])} objects of {manifest['made']}, {total:,} bytes"
