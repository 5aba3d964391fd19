"""Checks of the places that a run reads and writes: folders, buckets, the disk under them, and their clocks."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from jobs.config import RunConfig
from jobs.doctor.finding import Finding, first_line
from pipeline.errors import InputError
from pipeline.schemes import scheme_of
from pipeline.storage import exists, filesystem, is_remote, join
from pipeline.stream.manifest import manifest_location

_ENOUGH = 2 * 2**30
"""Bytes of disk below which a run that has no plan yet is warned of."""
_SKEW_WARN_S, _SKEW_FAIL_S = 5.0, 60.0
"""Leases last minutes and are told by several clocks; S3 refuses requests that are signed 15 minutes off."""
_HEAD_S = 5.0


def storage(config: RunConfig) -> Iterator[Finding]:
    """Read and write where the run will."""
    yield local_folder("run_root", config.run_root)
    if config.store_root is not None:
        yield bucket("run_root", config.store_root)
    yield disk(config)
    if config.publish:
        yield bucket("publish", config.publish)
    if config.manifest:
        yield readable("manifest", manifest_location(config.manifest))
    elif config.data.root is not None:
        yield readable("data.root", config.data.root)


def local_folder(what: str, folder: Path) -> Finding:
    """Write, read and rename a file in a folder, or in the one it will be made in; nothing of it stays."""
    place = _standing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            first, second = Path(scratch) / "first", Path(scratch) / "second"
            second.write_bytes(b"old")
            first.write_bytes(b"new")
            first.replace(second)
            if first.exists() or second.read_bytes() != b"new":
                remedy = "choose a run_root on storage with ordinary renames"
                return Finding(what, f"{folder} does not rename a file over another", "fail", remedy)
    except OSError as error:
        remedy = f"let this user write to {place}, or choose another run_root"
        return Finding(what, f"{folder}: {first_line(error)}", "fail", remedy)
    return Finding(what, f"{folder} is written, read and renamed in")


def _standing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk(config: RunConfig) -> Finding:
    """Whether the disk under the run has what its plan says that checkpoints take."""
    from jobs.run_folder import RunFolder
    from jobs.stages.plan import RunPlan

    place, plan = _standing(config.folder), RunFolder(config.folder).plan
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free under {place}"
    remedy = "free some, lower training.keep_checkpoints, or choose another run_root"
    if plan.is_file():
        need = RunPlan.model_validate_json(plan.read_text()).training.kept_bytes
        found += f", the plan's checkpoints take {need / 2**30:.1f} GiB"
        return Finding("disk", found, "fail" if need > free else "ok", remedy if need > free else "")
    if free < _ENOUGH:
        return Finding("disk", f"{found}, no plan says yet what is needed", "warn", remedy)
    return Finding("disk", found)


def bucket(what: str, url: str) -> Finding:
    """Write, read and delete an object under a URL."""
    remedy = f"check the URL and {scheme.credentials}" if (scheme := scheme_of(url)) else "name a bucket"
    try:
        fs, root = filesystem(url)
        path = join(root.rstrip("/"), f".doctor-{uuid.uuid4().hex}")
        fs.pipe_file(path, b"new")
        try:
            if fs.cat_file(path) != b"new":
                return Finding(what, f"{url} gives back another object than was written", "fail", remedy)
        finally:
            fs.rm_file(path)
    except Exception as error:  # noqa: BLE001 - each package raises its own; it is told in the finding
        return Finding(what, f"{url}: {first_line(error)}", "fail", remedy)
    return Finding(what, f"{url} is written, read and deleted in")


def readable(what: str, place: str) -> Finding:
    """Whether a file or folder that is read is there."""
    scheme = scheme_of(place)
    if scheme is not None and not scheme.is_listed and what != "manifest":
        return Finding(what, f"{place} lists nothing; prepare asks for its files")
    remedy = f"check {what} and {scheme.credentials}" if scheme else f"check {what}: it is taken from where you stand"
    try:
        fs, path = filesystem(place)
        if not exists(fs, path):
            return Finding(what, f"{place} is not there", "fail", remedy)
        if fs.isdir(path):
            return Finding(what, f"{place} holds {len(fs.ls(path, detail=False))} entries")
        fs.cat_file(path, start=0, end=1)
    except InputError as error:
        return Finding(what, first_line(error), "fail", remedy)
    except Exception as error:  # noqa: BLE001 - each package raises its own; it is told in the finding
        return Finding(what, f"{place}: {first_line(error)}", "fail", remedy)
    return Finding(what, f"{place} is readable")


def clock(config: RunConfig) -> Iterator[Finding]:
    """Hold this machine's clock against those of the servers that the run speaks with."""
    servers = clock_servers(config)
    for url in servers:
        yield clock_against(url)
    if not servers:
        yield Finding("clock", "nothing but this machine's is used")


def clock_servers(config: RunConfig) -> list[str]:
    """Return the addresses whose answers bear a date: of tracking and of storage."""
    found = [config.tracking.uri] if config.tracking.uri.startswith("http") else []
    places = [
        str(p) for p in (config.store_root, config.publish, config.manifest, config.data.root) if p and is_remote(p)
    ]
    if any(place.startswith("s3:") for place in places):
        found.append(os.environ.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com")
    if any(place.startswith("gs:") for place in places):
        found.append(os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com")
    return [*found, *(place for place in places if place.startswith("https:"))]


def clock_against(url: str) -> Finding:
    """Compare the clock with the date in a server's answer, which is whole seconds."""
    import requests

    begun = time.time()
    try:
        answer = requests.head(url, timeout=_HEAD_S, allow_redirects=False)
        theirs = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (requests.RequestException, KeyError, ValueError) as error:
        remedy = "see what is said of tracking and storage; the clock itself may be right"
        return Finding("clock", f"{url} tells no date: {first_line(error)}", "warn", remedy)
    skew = abs(theirs + 0.5 - (begun + time.time()) / 2)
    found = f"{skew:.0f} s off {url}" if skew >= 1.5 else f"as {url} has it"
    if skew > _SKEW_WARN_S:
        remedy = "set the clock: timedatectl set-ntp true, here and there"
        return Finding("clock", found, "fail" if skew > _SKEW_FAIL_S else "warn", remedy)
    return Finding("clock", found)
