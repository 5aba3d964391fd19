"""Hooks of MkDocs: pages from where they stand in the repository, reference pages from the code; no copies are kept.

A page of the repository keeps its path, so that its links to other pages hold. A link to a file that is no page becomes
the file's path as text, an image that is shown comes along, and a link to nothing stays, which ends the build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from infra.docs import reference

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = {
    "configuration.md": reference.configuration,
    "study.md": reference.study,
    "commands.md": reference.commands,
    "python.md": reference.python_names,
}
"""Pages that are made from the code."""
FENCED = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that the navigation names and the images that they show."""
    for uri in _named(config.nav):
        if uri in WRITTEN:
            files.append(File.generated(config, uri, content=WRITTEN[uri]()))
        elif (ROOT / uri).is_file():
            files.append(_from_repository(config, uri))
            for image, _, target, _ in LINK.findall((ROOT / uri).read_text()):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(uri), target))
                if image and (ROOT / path).is_file() and files.get_file_from_path(path) is None:
                    files.append(_from_repository(config, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links fit the pages that there are; comments go, which would swallow a table below them."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    pages = {file.abs_src_path: file.src_uri for file in files if file.abs_src_path}

    def fit(link: re.Match[str]) -> str:
        words, target = link[2], link[3]
        path = (Path(source).parent / target).resolve()
        if "://" in target or not path.exists():
            return link[0]
        if str(path) in pages:
            here = posixpath.relpath(pages[str(path)], posixpath.dirname(page.file.src_uri) or ".")
            return link[0].replace(f"({target}", f"({here}")
        named = f"`{path.relative_to(ROOT)}`"
        return named if words.strip("`") == target else f"{words} ({named})"

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(fit, COMMENT.sub("", part)) for part in parts[::2]]
    return "".join(parts)


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(each)


def _from_repository(config: MkDocsConfig, uri: str) -> File:
    file = File.generated(config, uri, abs_src_path=str(ROOT / uri), inclusion=InclusionLevel.INCLUDED)
    file.dest_uri = file.dest_uri.removeprefix(".github/")  # servers of pages leave such folders out
    return file
