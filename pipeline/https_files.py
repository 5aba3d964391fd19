"""Files of a web server: fsspec's, but no answer is taken for a file that is not there, and none for a range of one."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from fsspec.asyn import sync_wrapper
from fsspec.implementations.http import HTTPFileSystem

from pipeline.errors import InputError


class HttpsFiles(HTTPFileSystem):
    """fsspec's file system over HTTPS, read-only, which says what it cannot do."""

    protocol = "https"

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        """Return what the server's headers say of a file.

        fsspec takes any failure for a file that is not there; here one that may pass is raised as it is.

        Raises:
            FileNotFoundError: the server knows no such file.
            InputError: it does not tell the size, or leads away from HTTPS.
        """
        session = await self.set_session()
        async with session.head(self.encode_url(url), allow_redirects=True) as answer:
            is_known = answer.status not in (403, 405, 501)
            headers = answer.headers  # its keys are found in any case
            if is_known:
                self._raise_not_found_for_status(answer, url)
        if not is_known:  # the server lets files be read alone, or knows no HEAD
            async with session.get(self.encode_url(url)) as answer:
                self._raise_not_found_for_status(answer, url)
                headers = answer.headers
        if answer.url.scheme != "https":
            raise InputError(f"a file must come over HTTPS, {url} leads to {answer.url}; name the address it lies at")
        size = headers.get("Content-Length", "")
        if not size.isdigit() or headers.get("Content-Encoding", "identity") != "identity":
            raise InputError(
                f"a server must tell the size of a file as it lies there, that of {url} does not (Content-Length "
                f"{size or 'missing'}, Content-Encoding {headers.get('Content-Encoding', 'none')}); copy the file"
            )
        found = {"name": url, "type": "file", "size": int(size)}
        if "ETag" in headers:
            return {**found, "ETag": headers["ETag"]}
        # A time in whole seconds: two versions of one second are told apart by their sizes, if at all.
        return (
            {**found, "Last-Modified": f"{headers['Last-Modified']}, {size}"} if "Last-Modified" in headers else found
        )

    async def _exists(self, path: str, **_: Any) -> bool:
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    async def _isdir(self, path: str) -> bool:
        return False

    async def _ls(self, url: str, detail: bool = True, **_: Any) -> Any:
        """Refuse: what a page links to is no list of a folder's files.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"a web server has no list of the files in a folder, got {url}; name each file, as in data.files, or copy "
            "them to a folder or a bucket"
        )

    ls = sync_wrapper(_ls)

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        if start is None and end is None:
            return bytes(await super()._cat_file(url))
        if start is None or end is None:
            size = (await self._info(url))["size"]
            start, end = start or 0, size if end is None else end
        if start == end:
            return b""
        session = await self.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}"}
        async with session.get(self.encode_url(url), headers=headers) as answer:
            if answer.status == 416:
                return b""
            self._raise_not_found_for_status(answer, url)
            if answer.status != 206:
                raise _without_ranges(url)
            return bytes(await answer.read())

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **more: Any) -> Any:
        """Open a file for reading at any place.

        Raises:
            InputError: the server sends nothing but whole files.
        """
        size = int(self.info(path)["size"])
        if not size:
            return BytesIO()
        self.cat_file(path, start=0, end=1)
        return super()._open(path, mode, block_size, size=size, **more)


def _without_ranges(url: str) -> InputError:
    return InputError(
        f"a server must answer for ranges of bytes, that of {url} sends the whole file; copy the file, or serve it by "
        "one that does (nginx, Apache, Caddy)"
    )
