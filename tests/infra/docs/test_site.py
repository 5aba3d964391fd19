"""The documentation is whole: every text, key, command and name; it loads nothing from elsewhere, no link is broken."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from inspect import isclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
import yaml
from pydantic import BaseModel

import mtl_lora
from jobs import cli
from jobs.config import RunConfig
from jobs.study_config import StudyConfig

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "infra/docs"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def build(config: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as ``make docs`` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", into]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(DOCS / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def ids(page: Path) -> set[str]:
    """Return what a link into a page may name."""
    return {html.unescape(name) for name in re.findall(r' id="([^"]+)"', page.read_text())}


def keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield each key of a configuration, those inside other keys too."""
    for name, field in model.model_fields.items():
        key = f"{path}{field.alias or name}"
        if key != "tasks.TASK.name":  # is the TASK of the mapping
            yield key
            yield from keys_within(field.annotation, key)


def keys_within(annotation: Any, key: str) -> Iterator[str]:
    origin = get_origin(annotation)
    if isclass(annotation) and not origin and issubclass(annotation, BaseModel):
        yield from keys(annotation, f"{key}.")
    holds = isclass(origin) and issubclass(origin, Mapping | list | tuple)
    step = ("KEY" if issubclass(origin, Mapping) else "TASK" if key == "tasks" else "N") if holds else ""
    for inner in get_args(annotation):
        yield from keys_within(inner, f"{key}.{step}" if step else key)


@pytest.mark.parametrize(("page", "model"), [("configuration.html", RunConfig), ("study.html", StudyConfig)])
def test_each_key_of_a_configuration_stands_in_the_reference(site: Path, page: str, model: type[BaseModel]) -> None:
    wanted = set(keys(model))
    assert len(wanted) > 40
    assert wanted - ids(site / page) == set()


def test_a_key_stands_with_its_type_its_default_its_rule_and_its_description(site: Path) -> None:
    text = (site / "configuration.html").read_text()
    row = next(row for row in text.split("<tr>") if 'id="retraining.replay_share"' in row)
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)]
    words = "Share of the replayed days' samples that is mixed in."
    assert [html.unescape(cell) for cell in cells] == ["retraining.replay_share", "number", "0.1", "> 0, ≤ 1", words]


def commands(words: str, command: Any) -> Iterator[tuple[str, list[str]]]:
    yield words, [option for each in command.params for option in each.opts if option.startswith("--")]
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(f"{words} {name}", each)


def test_each_command_stands_in_the_reference_with_each_option(site: Path) -> None:
    parts = re.split(r'<h[12] id="([^"]+)"', (site / "commands.html").read_text())
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    found["mtl-lora"] = found.pop("commands")
    wanted = dict(commands("mtl-lora", typer.main.get_command(cli.app)))
    assert len(wanted) > 25
    assert found.keys() == {words.replace(" ", "-") for words in wanted}
    for words, options in wanted.items():
        assert [option for option in options if option not in found[words.replace(" ", "-")]] == []


def test_each_public_name_stands_in_the_reference_with_its_words(site: Path) -> None:
    page = site / "python.html"
    assert {f"mtl_lora.{name.strip('_')}" for name in mtl_lora.__all__} <= ids(page)
    assert {"mtl_lora.export.export_task", "mtl_lora.errors.ConfigError"} <= ids(page)
    assert "the mean of all tasks" in page.read_text()  # add_task, of its argument


def test_each_text_of_the_repository_is_a_page(site: Path) -> None:
    folders = ("mtl_lora", "pipeline", "jobs", "infra", "tests", "infra/locks")
    wanted = ["index.html", "infra/RUNBOOK.html", "SECURITY.html", *(f"{folder}/index.html" for folder in folders)]
    assert all((ROOT / folder / "README.md").is_file() for folder in folders)
    assert [page for page in wanted if not (site / page).is_file()] == []
    assert "".join((site / "index.html").read_text().split()).count("<h2") > 5


class Loads(HTMLParser):
    """Addresses that a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"src", "srcset", "data", "poster"} | ({"href"} if tag == "link" else set())
        self.found += [value for name, value in attrs if name in names and value]


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert any(address.endswith("style.css") for address in loads.found), page
        assert [address for address in loads.found if re.match(r"\w+:|//", address)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", sheet.read_text()) == [], sheet


def test_a_broken_link_ends_the_build_and_one_to_a_file_that_is_no_page_does_not(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    settings = {"INHERIT": str(DOCS / "mkdocs.yml"), "docs_dir": str(pages), "hooks": [str(DOCS / "gather.py")]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings | {"nav": ["page.md"], "extra_css": []}))
    for target, code in (("nowhere.md", 1), (ROOT / "Makefile", 0)):
        (pages / "page.md").write_text(f"# Page\n\nSee [it]({target}).\n")
        done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
        assert done.returncode == code, done.stderr
        assert ("contains a link 'nowhere.md'" in done.stderr) == (code == 1)
    assert "it (<code>Makefile</code>)" in (tmp_path / "site/page.html").read_text()
