"""Where the samples of one tar stand: what its first pass leaves for its index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingestion.tar_records import TarSample
from pipeline.json_text import parse_json


@dataclass(frozen=True)
class TarPlaces:
    """The samples of a tar in their order; arrays have a row a sample and a column an extension."""

    keys: list[str]
    extensions: tuple[str, ...]
    """Sorted."""
    offsets: np.ndarray
    """Of the members' contents, in bytes; 0 where a sample has no such member."""
    sizes: np.ndarray
    checksums: np.ndarray
    """Of all members of a sample, as the index has it."""
    images: np.ndarray
    """Column of the image that a sample is shown with, -1 where there is none."""
    days: list[str]
    """ISO dates, empty where a sample has none."""

    def image(self, row: int) -> tuple[int, int]:
        """Return place and size of a sample's image."""
        column = int(self.images[row])
        return int(self.offsets[row, column]), int(self.sizes[row, column])

    def entry(self, row: int) -> dict[str, Any]:
        """Return what quarantine keeps of a sample that was valid."""
        at = zip(self.extensions, self.offsets[row].tolist(), self.sizes[row].tolist(), strict=True)
        members = {extension: [offset, size] for extension, offset, size in at if offset}
        found: dict[str, Any] = {"key": self.keys[row], "members": members, "checksum": int(self.checksums[row])}
        return found | {"time": self.days[row]} if self.days[row] else found

    def write(self, path: Path) -> None:
        """Write a line of JSON and the arrays behind it."""
        head = {"keys": self.keys, "extensions": self.extensions, "days": self.days if any(self.days) else []}
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for array in (self.offsets, self.sizes, self.checksums, self.images):
                file.write(array.astype(np.int64).tobytes())

    @classmethod
    def read(cls, path: Path) -> TarPlaces:
        """Read what ``write`` wrote."""
        with path.open("rb") as file:
            head = parse_json(file.readline())
            numbers = np.frombuffer(file.read(), dtype=np.int64)
        count, width = len(head["keys"]), len(head["extensions"])
        places = numbers[: 2 * count * width].reshape(2, count, width)
        checksums, images = numbers[2 * count * width :].reshape(2, count)
        days = head["days"] or [""] * count
        return cls(head["keys"], tuple(head["extensions"]), places[0], places[1], checksums, images, days)


class PlacesOfTar:
    """Gathers the places of a tar's samples."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._members: list[Mapping[str, tuple[int, int]]] = []
        self._checksums: list[int] = []
        self._images: list[str | None] = []
        self._days: list[str] = []

    def add(self, key: str, sample: TarSample, image: str | None, day: str | None) -> None:
        """Add the next sample, with the extension of the image that it is shown with."""
        self._keys.append(key)
        self._members.append(sample.members)
        self._checksums.append(sample.checksum)
        self._images.append(image)
        self._days.append(day or "")

    def found(self) -> TarPlaces:
        """Return all that were added."""
        extensions = sorted({extension for members in self._members for extension in members})
        none = (0, 0)
        places = [[members.get(extension, none) for extension in extensions] for members in self._members]
        table = np.array(places, dtype=np.int64).reshape(len(places), len(extensions), 2)
        columns: dict[str | None, int] = {extension: column for column, extension in enumerate(extensions)}
        images = np.array([columns.get(image, -1) for image in self._images], dtype=np.int64)
        checksums = np.array(self._checksums, dtype=np.int64)
        offsets, sizes = table[:, :, 0], table[:, :, 1]
        return TarPlaces(self._keys, tuple(extensions), offsets, sizes, checksums, images, self._days)
