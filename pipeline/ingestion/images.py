"""Images that records name: members of ``images.zip`` in the task's folder, or files beside the records."""

from __future__ import annotations

import posixpath
import zipfile
import zlib
from typing import Any

from pipeline.errors import InputError
from pipeline.images import MAX_BYTES, UnreadableImage, decoded
from pipeline.record import Rejected, is_unicode
from pipeline.retry import is_outage
from pipeline.storage import exists, filesystem, is_remote

ARCHIVE = "images.zip"
MAX_IMAGE_BYTES = MAX_BYTES
MAX_NAME = 1000
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def check_image(data: bytes) -> None:
    """Decode an image once, so that none stops a training later.

    Raises:
        Rejected: it is damaged or too large.
    """
    try:
        decoded(data)
    except UnreadableImage as reason:
        raise Rejected(str(reason)) from None


class ImageFolder:
    """The images beside one record file.

    Raises:
        InputError: ``images.zip`` is damaged.
    """

    def __init__(self, record_file: str) -> None:
        self.record_file = record_file
        self._remote = is_remote(record_file)
        self._fs, path = filesystem(record_file)
        self._folder = posixpath.dirname(path)
        self._zip: zipfile.ZipFile | None = None
        if exists(self._fs, f"{self._folder}/{ARCHIVE}"):
            self._zip = self._opened(f"{self._folder}/{ARCHIVE}")

    def _opened(self, path: str) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._fs.open(path, "rb"))
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} must be a whole zip archive, it is not: {error}; copy it again") from error

    def read(self, name: Any) -> bytes:
        """Return one image's encoded bytes.

        Raises:
            Rejected: there is none of that name, it is too large, or neither PNG nor JPEG.
        """
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or ":" in name:
            raise Rejected("image name is not a relative path")
        if "\0" in name or not is_unicode(name) or len(name) > MAX_NAME:
            raise Rejected(f"image name is not valid Unicode of at most {MAX_NAME} characters")
        data = self._from_zip(self._zip, name) if self._zip else self._from_folder(name)
        if not data.startswith(SIGNATURES):
            raise Rejected("image is neither PNG nor JPEG")
        return data

    def _from_zip(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            info = archive.getinfo(name)
        except KeyError:
            raise Rejected("image is missing") from None
        if info.file_size > MAX_IMAGE_BYTES:
            raise Rejected(f"image is larger than {MAX_IMAGE_BYTES} bytes")
        try:
            with archive.open(info) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)  # the size in the directory may lie
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            if self._remote and is_outage(error):
                raise  # the caller reads again
            raise Rejected("image cannot be unpacked") from None
        if len(data) > MAX_IMAGE_BYTES:
            raise Rejected(f"image is larger than {MAX_IMAGE_BYTES} bytes")
        return data

    def _from_folder(self, name: str) -> bytes:
        path = f"{self._folder}/{name}"
        try:
            info = self._fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Rejected("image is missing") from None
        if info["type"] != "file":
            raise Rejected("image is missing")
        if int(info["size"]) > MAX_IMAGE_BYTES:
            raise Rejected(f"image is larger than {MAX_IMAGE_BYTES} bytes")
        return bytes(self._fs.cat_file(path))
