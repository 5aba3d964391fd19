"""Hidden states kept on disk: a bounded folder of append-only blocks, shared by all processes that are given it.

A segment is two files: ``NAME.states`` holds the samples' states one after another, ``NAME.index`` an entry a sample,
written after them, with its key, its place and a digest. Processes append under the operating system's lock, which a
killed one does not hold on to; whoever does not get it in time keeps nothing, and computes anew later. Whatever
is torn, damaged or gone is told by the digest or the missing file, and computed anew. The segments used longest ago go
first.

Axes: M nodes, H hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from pipeline.modeling.config import Precision
from pipeline.progress import say
from pipeline.retry import is_full

_ENTRY = struct.Struct("<32sQI32sI")
"""Key, place in the states' file, nodes, sha256 of the bytes, crc32 of all this."""
_STATES, _INDEX = ".states", ".index"
_LOCK_TIMEOUT_S = 1.0
_SEGMENTS = 16
"""A segment is at most this part of the bound, so that little is lost when one goes."""
_MOST_SEGMENT_BYTES = 256 << 20


class _Place(NamedTuple):
    segment: str
    start: int
    nodes: int
    digest: bytes


def _size(records: Mapping[bytes, tuple[int, bytearray]]) -> int:
    return sum(len(content) + _ENTRY.size for _, content in records.values())


class KeptStates:
    """States by key.

    Args:
        root: folder of everything that is kept, whatever it belongs to.
        max_bytes: most bytes of all in it.
        identity: of the model and of how it computes: plain values, of which equal ones share their states.
        hidden_size: H.
        dtype: of the states.
        precision: ``exact`` as they are, ``int8`` with a scale a node.

    Attributes:
        count_read: how often states were found.
        count_missed: how often none were.
        damaged: how often they were damaged.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        identity: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype,
        precision: Precision = "exact",
    ) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.hidden_size, self.dtype, self.precision = hidden_size, dtype, precision
        described = {**identity, "hidden_size": hidden_size, "dtype": str(dtype), "precision": precision, "format": 1}
        text = json.dumps(described, indent=2, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{secrets.token_hex(8)}"
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.folder / "identity.json")
        self.count_read = self.count_missed = self.damaged = 0
        self._segment_bytes = max(1, min(_MOST_SEGMENT_BYTES, max_bytes // _SEGMENTS))
        self._mutex = threading.Lock()
        self._places: dict[bytes, _Place] = {}
        self._indexed: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._newest: str | None = None
        self._keeps = True

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return the states (M, H) of each key on the CPU, None where none are kept or they are damaged."""
        with self._mutex:
            if any(key not in self._places for key in keys):
                self._refresh()
            found = [self._read(key) for key in keys]
            missed = sum(states is None for states in found)
            self.count_missed += missed
            self.count_read += len(found) - missed
            for segment in {self._places[key].segment for key in keys if key in self._places}:
                with contextlib.suppress(FileNotFoundError):  # another process has let it go
                    os.utime(self.folder / f"{segment}{_STATES}")
            return found

    def _read(self, key: bytes) -> Tensor | None:
        place = self._places.get(key)
        if place is None:
            return None
        content = bytearray(place.nodes * self._node_bytes)
        try:
            if place.segment not in self._files:
                self._files[place.segment] = os.open(self.folder / f"{place.segment}{_STATES}", os.O_RDONLY)
            read = os.preadv(self._files[place.segment], [content], place.start)
        except FileNotFoundError:
            del self._places[key]
            return None
        if read != len(content) or hashlib.sha256(content).digest() != place.digest:
            del self._places[key]
            if not self.damaged:
                say(f"kept states in {self.folder} are damaged, those of {place.segment} are computed anew")
            self.damaged += 1
            return None
        return self._decoded(torch.frombuffer(content, dtype=torch.uint8), place.nodes)

    def _refresh(self) -> None:
        """Take in what was appended since by any process, and drop what is gone."""
        with os.scandir(self.folder) as found:
            sizes = {entry.name[: -len(_INDEX)]: entry.stat().st_size for entry in found if entry.name.endswith(_INDEX)}
        for gone in self._indexed.keys() - sizes.keys():
            del self._indexed[gone]
            self._places = {key: place for key, place in self._places.items() if place.segment != gone}
            if gone in self._files:
                os.close(self._files.pop(gone))
        self._newest = max(sizes, default=None)
        for name, size in sorted(sizes.items()):  # by the time they were begun: the newest entry of a key counts
            start = self._indexed.setdefault(name, 0)
            if size < start + _ENTRY.size:
                continue
            with contextlib.suppress(FileNotFoundError), (self.folder / f"{name}{_INDEX}").open("rb") as file:
                file.seek(start)
                content = file.read((size - start) // _ENTRY.size * _ENTRY.size)
                self._indexed[name] = start + len(content)
                for key, place, nodes, digest, check in _ENTRY.iter_unpack(content):
                    if check == zlib.crc32(_ENTRY.pack(key, place, nodes, digest, 0)):
                        self._places[key] = _Place(name, place, nodes, digest)

    # --- keeping ----------------------------------------------------------------------------------------------------

    def keep(self, keys: Sequence[bytes], states: Sequence[Tensor]) -> list[Tensor]:
        """Keep states (M, H) that were computed, as far as there is room; return them as reading would."""
        encoded = [self._encoded(one) for one in states]
        with self._mutex, contextlib.suppress(Timeout):
            if self._keeps:
                with FileLock(self.root / ".lock", timeout=_LOCK_TIMEOUT_S):
                    self._append(keys, [(len(one), content) for one, content in zip(states, encoded, strict=True)])
        if self.precision == "exact":
            return list(states)
        pairs = zip(encoded, states, strict=True)
        return [self._decoded(torch.frombuffer(content, dtype=torch.uint8), len(one)) for content, one in pairs]

    def _append(self, keys: Sequence[bytes], records: Sequence[tuple[int, bytearray]]) -> None:
        self._refresh()
        chunk: dict[bytes, tuple[int, bytearray]] = {}
        for key, record in zip(keys, records, strict=True):
            # What would take a large part of the bound is not kept: it would push out everything else.
            if key not in self._places and len(record[1]) <= self.max_bytes // 4:
                chunk[key] = record
            if _size(chunk) >= self._segment_bytes:
                self._append_chunk(chunk)
                chunk = {}
        self._append_chunk(chunk)

    def _append_chunk(self, records: Mapping[bytes, tuple[int, bytearray]]) -> None:
        if not records or not self._keeps:
            return
        name = self._newest
        path = self.folder / f"{name}{_STATES}"
        if name is None or not path.exists() or path.stat().st_size >= self._segment_bytes:
            name = self._newest = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._make_room(_size(records), self.folder / f"{name}{_STATES}")
        try:
            self._write(name, records)
        except OSError as error:
            if not is_full(error):
                raise
            say(f"the disk of {self.folder} is full: no more states are kept")
            self._keeps = False

    def _write(self, name: str, records: Mapping[bytes, tuple[int, bytearray]]) -> None:
        entries = []
        with (self.folder / f"{name}{_STATES}").open("ab") as file:
            for key, (nodes, content) in records.items():
                fields = (key, file.tell(), nodes, hashlib.sha256(content).digest())
                entries.append(_ENTRY.pack(*fields, zlib.crc32(_ENTRY.pack(*fields, 0))))
                file.write(content)
        with (self.folder / f"{name}{_INDEX}").open("ab") as file:
            file.truncate(file.tell() // _ENTRY.size * _ENTRY.size)  # a killed process may have left half an entry
            file.write(b"".join(entries))

    def _make_room(self, size: int, appended: Path) -> None:
        """Let go of the segments used longest ago until so many more bytes keep within the bound."""
        segments = []
        for path in self.root.glob(f"*/*{_STATES}"):
            with contextlib.suppress(FileNotFoundError):
                status, index = path.stat(), path.with_suffix(_INDEX)
                held = status.st_size + (index.stat().st_size if index.exists() else 0)
                segments.append((path == appended, status.st_mtime_ns, held, path))
        total = sum(held for _, _, held, _ in segments)
        for _, _, held, path in sorted(segments):
            if total + size <= self.max_bytes:
                return
            path.with_suffix(_INDEX).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            total -= held

    # --- what a state is as bytes -----------------------------------------------------------------------------------

    @property
    def _node_bytes(self) -> int:
        return self.hidden_size + 4 if self.precision == "int8" else self.hidden_size * self.dtype.itemsize

    def _encoded(self, states_MH: Tensor) -> bytearray:
        """Return states as bytes: as they are, or the scale of each node in fp32, then its values as int8."""
        states = states_MH.detach().cpu().contiguous()
        if self.precision == "exact":
            return bytearray(states.view(torch.uint8).numpy())
        values = states.float()
        scale_M1 = values.abs().amax(1, keepdim=True) / 127
        rounded = (values / scale_M1.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return bytearray(scale_M1.numpy().tobytes() + rounded.numpy().tobytes())

    def _decoded(self, content: Tensor, nodes: int) -> Tensor:
        if self.precision == "exact":
            return content.view(self.dtype).view(nodes, self.hidden_size)
        scale_M1 = content[: 4 * nodes].view(torch.float32)[:, None]
        values = content[4 * nodes :].view(torch.int8).view(nodes, self.hidden_size)
        return (values.float() * scale_M1).to(self.dtype)
