"""A release is what is committed: all that the packages need is in the wheel, and a commit has one form."""

from __future__ import annotations

import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from infra import release

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mtl_lora", "pipeline", "jobs")


def _tracked(*under: str) -> list[str]:
    return release.git(ROOT, "ls-files", *under).splitlines()


def _copied(folder: Path) -> Path:
    for name in _tracked():
        if (path := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_builds_are_the_same_bytes_and_hold_what_the_packages_need(tmp_path: Path) -> None:
    sums = []
    for name in ("first", "second"):
        release.build(_copied(tmp_path / name / "source"), tmp_path / name / "made", 1_700_000_000)
        sums.append(release.sums(tmp_path / name / "made"))
    assert sums[0] == sums[1]
    version = release.version_of(ROOT)
    assert [line.split("  ")[1] for line in sums[0].splitlines()] == [
        f"mtl_lora-{version}-py3-none-any.whl",
        f"mtl_lora-{version}.tar.gz",
    ]
    (path,) = (tmp_path / "first" / "made").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        told = Parser().parsestr(wheel.read(f"mtl_lora-{version}.dist-info/METADATA").decode())
    assert (told["Name"], told["Version"]) == ("mtl-lora", version)
    needed = {name for name in _tracked(*PACKAGES) if not name.endswith("README.md")}
    assert {"mtl_lora/py.typed", "jobs/configs/demo.yaml", "pipeline/report/templates/page.html.j2"} <= needed
    assert needed - names == set()
    assert {name for name in names if ".dist-info/" not in name} - needed == set()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "mtl_lora").mkdir()
    (tmp_path / "mtl_lora" / "__init__.py").write_text('__version__ = "1.2.0"\n"""Its place."""\n')
    release.git(tmp_path, "init", "--quiet")
    _commit(tmp_path, "Begin")
    return tmp_path


def _commit(folder: Path, subject: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    release.git(folder, "add", "--all")
    subprocess.run(["git", *who, "commit", "--quiet", "--allow-empty", "-m", subject], cwd=folder, check=True)


def test_a_changed_tree_and_a_version_of_another_commit_are_refused(checkout: Path) -> None:
    release.check(checkout, release.version_of(checkout))
    release.git(checkout, "tag", "v1.2.0")
    release.check(checkout, "1.2.0")
    (checkout / "new file").touch()
    with pytest.raises(release.Refusal, match=r"new file.*Remedy: commit"):
        release.check(checkout, "1.2.0")
    _commit(checkout, "Go on")
    with pytest.raises(release.Refusal, match=r"v1\.2\.0 names another one.*raise mtl_lora.__version__"):
        release.check(checkout, "1.2.0")
    release.check(checkout, "1.3.0")


def test_the_notes_are_the_commits_since_the_release_before(checkout: Path) -> None:
    assert release.notes(checkout, "1.2.0").endswith("Since the beginning:\n\n- Begin\n")
    release.git(checkout, "tag", "v1.2.0")
    _commit(checkout, "Go on")
    release.git(checkout, "tag", "v1.3.0")
    assert release.notes(checkout, "1.3.0").endswith("Since v1.2.0:\n\n- Go on\n")


def test_a_folder_without_a_version_is_refused(checkout: Path) -> None:
    (checkout / "mtl_lora" / "__init__.py").write_text("")
    with pytest.raises(release.Refusal, match="must assign __version__"):
        release.version_of(checkout)
