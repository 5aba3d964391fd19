"""A release of this commit, into dist/: wheel, sdist, notes, SBOM, sums; and the image where Docker is.

    python infra/release.py     (make release)

The version is ``mtl_lora.__version__``. All is built from what is committed, with the locked setuptools of the
environment that runs this, so that nothing is fetched for it and the same commit gives the same bytes.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, SBOM = ROOT / "dist", ROOT / "runs" / "sbom.json"


class Refusal(Exception):
    """A rule that the checkout breaks: the rule, the value, the remedy."""


def main() -> int:
    """Write the release and return the exit code."""
    try:
        version = version_of(ROOT)
        check(ROOT, version)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return 2
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True)
    epoch = int(git(ROOT, "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        with tarfile.open(fileobj=io.BytesIO(git_bytes(ROOT, "archive", "HEAD"))) as archive:
            archive.extractall(source, filter="data")
        build(source, made, epoch)
        (made / "RELEASE_NOTES.md").write_text(notes(ROOT, version))
        shutil.copy(SBOM, made / f"mtl_lora-{version}.cdx.json")
        image = build_image(source, version)
        (made / "SHA256SUMS").write_text(sums(made))
        DIST.mkdir(exist_ok=True)
        for path in sorted(made.iterdir()):
            shutil.copy(path, DIST)
            sys.stdout.write(f"dist/{path.name}\n")
    sys.stdout.write(f"{image}\n")
    return 0


def version_of(source: Path) -> str:
    """Return the version, read as setuptools reads it: nothing is imported."""
    for node in ast.parse((source / "mtl_lora" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and [getattr(name, "id", "") for name in node.targets] == ["__version__"]:
            return str(ast.literal_eval(node.value))
    raise Refusal("rule: mtl_lora/__init__.py must assign __version__; it does not. Remedy: assign a literal")


def check(root: Path, version: str) -> None:
    """Refuse a tree that is not what is committed, and a version that another commit has.

    Raises:
        Refusal: it is refused.
    """
    if changed := git(root, "status", "--porcelain"):
        shown = ", ".join(line[3:] for line in changed.splitlines()[:5])
        raise Refusal(f"rule: a release is what is committed; not so: {shown}. Remedy: commit, or git stash -u")
    tagged = git(root, "tag", "--list", f"v{version}")
    if tagged and git(root, "rev-parse", f"{tagged}^{{commit}}") != git(root, "rev-parse", "HEAD"):
        raise Refusal(
            f"rule: a version is one commit; tag v{version} names another one. Remedy: raise mtl_lora.__version__"
        )


def build(source: Path, made: Path, epoch: int) -> None:
    """Build wheel and sdist of a folder of sources; files of that folder are all that they hold.

    Args:
        source: files as committed, without what earlier builds left.
        made: new folder for both.
        epoch: time of every file in them, in seconds since 1970.
    """
    command = [Path(sys.executable).with_name("uv"), "build", "--offline", "--no-build-isolation", "--no-config"]
    command += ["--no-create-gitignore", "--quiet", "--python", sys.executable, "--out-dir", made, source]
    subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}, check=True)
    for sdist in made.glob("*.tar.gz"):
        _dated(sdist, epoch)


def _dated(sdist: Path, epoch: int) -> None:
    """Write an sdist anew with one time and no owner: setuptools takes those of the files and of the clock."""
    levelled = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=levelled, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            content = old.extractfile(member)
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode, member.pax_headers = 0o755 if member.isdir() or member.mode & 0o100 else 0o644, {}
            new.addfile(member, content)
    sdist.write_bytes(gzip.compress(levelled.getvalue(), mtime=epoch))


def notes(root: Path, version: str) -> str:
    """Return the subjects of the commits since the last release before this one, the newest first."""
    tags = git(root, "tag", "--merged", "HEAD", "--list", "v*", "--sort=-creatordate").split()
    before = next((tag for tag in tags if tag != f"v{version}"), None)
    subjects = git(root, "log", "--no-merges", "--format=- %s", *([f"{before}..HEAD"] if before else []))
    return f"# mtl-lora {version}\n\nSince {before or 'the beginning'}:\n\n{subjects}\n"


def build_image(source: Path, version: str) -> str:
    """Build the image where a Docker daemon answers; return what was done, in words."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no image was built: no Docker daemon answers here"
    name = f"mtl-lora:{version}"
    subprocess.run(["docker", "build", "-f", "infra/docker/Dockerfile", "-t", name, "."], cwd=source, check=True)
    return f"image {name}"


def sums(folder: Path) -> str:
    """Return the files' sums as ``sha256sum --check`` reads them."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def git_bytes(root: Path, *arguments: str) -> bytes:
    """Return what git answers."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout


def git(root: Path, *arguments: str) -> str:
    """Return what git answers, as text without its end."""
    return git_bytes(root, *arguments).decode().rstrip()


if __name__ == "__main__":
    sys.exit(main())
