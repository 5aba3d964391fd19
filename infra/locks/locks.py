"""The locks beside this file: resolved from pyproject.toml, installed from, checked. Python's own library is enough.

    python infra/locks/locks.py compile [options of uv pip compile]     (make locks)
    python infra/locks/locks.py install {auto,cpu,cuda}                  (make env)
    python infra/locks/locks.py check                                    (make locks-check)

Each acts on the environment of the Python that runs it; ``compile`` and ``check`` need uv there, which dev.lock brings.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME, CPU, CUDA, DEV = (HERE / f"{name}.lock" for name in ("runtime", "cpu", "cuda", "dev"))
EXTRAS = ("pipeline", "s3", "postgres", "gcs", "azure")
"""The extras of pyproject.toml that run-time holds; ``dev`` comes on top."""
OF_TORCH = re.compile(r"torch|triton|(cuda|nvidia)-.+")
"""What differs between the builds of torch. A library under a new name would lie in runtime.lock, installed for all."""
HEADER = "# Written by `make locks` from pyproject.toml, see README.md here; do not edit.\n"


def main() -> None:
    """Run the named action."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("compile", help="other arguments go to uv: --upgrade, --upgrade-package NAME")
    actions.add_parser("install").add_argument("build", choices=("auto", "cpu", "cuda"))
    actions.add_parser("check")
    arguments, options = parser.parse_known_args()
    if options and arguments.action != "compile":
        parser.error(f"unknown arguments: {' '.join(options)}")
    if arguments.action == "compile":
        compile_locks(options)
    elif arguments.action == "install":
        install(arguments.build)
    else:
        check()


def compile_locks(options: list[str]) -> None:
    """Resolve run-time and development together, and write each package into the lock it belongs to.

    Args:
        options: of ``uv pip compile``; without any, pins that still hold stay.
    """
    with tempfile.TemporaryDirectory() as scratch:
        everything, runtime = Path(scratch) / "everything.txt", Path(scratch) / "runtime.txt"
        old = [entry for lock in (RUNTIME, CUDA, DEV) if lock.exists() for entry in entries(lock).values()]
        everything.write_text("".join(old))
        resolve(everything, "--extra", "dev", "--generate-hashes", *options)
        resolve(runtime, "--constraints", str(everything))
        pins, kept = entries(everything), entries(runtime)
        cpu_torch = hashed_cpu_wheel(version(pins["torch"]) + "+cpu", Path(scratch))
    of_torch = {name for name in pins if OF_TORCH.fullmatch(name)}
    common = "-r runtime.lock\n"
    RUNTIME.write_text(HEADER + "".join(pins[name] for name in pins if name in kept.keys() - of_torch))
    CUDA.write_text(HEADER + common + "".join(pins[name] for name in pins if name in of_torch))
    CPU.write_text(HEADER + common + cpu_torch)
    DEV.write_text(HEADER + "".join(pins[name] for name in pins if name not in kept))


def resolve(output: Path, *options: str) -> None:
    """Resolve run-time for every platform into a file; pins that the file already holds are preferred."""
    extras = [word for name in EXTRAS for word in ("--extra", name)]
    sources = ["pyproject.toml", "infra/locks/embedded-base.in"]
    fixed = ["--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "--quiet"]
    uv("compile", *sources, *extras, *fixed, "--output-file", str(output), *options)


def hashed_cpu_wheel(pin: str, scratch: Path) -> str:
    """Return the entry of torch's CPU build, with the hash of the wheel that pip finds; else the entry there is."""
    if pip("download", "--quiet", "--no-deps", "--dest", str(scratch), f"torch=={pin}").returncode == 0:
        digest = hashlib.sha256(next(scratch.glob("torch-*.whl")).read_bytes()).hexdigest()
        return f"torch=={pin} \\\n    --hash=sha256:{digest}\n"
    known = entries(CPU)["torch"] if CPU.exists() else ""
    if not known or version(known) != pin:
        sys.exit(
            f"rule: cpu.lock holds the hash of the wheel torch=={pin}, which pip does not find here. "
            "Remedy: name a folder or index that has it in PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL"
        )
    return known


def install(build: str) -> None:
    """Install run-time and development with hashes, then this project, and import what is heavy.

    Args:
        build: of torch; ``auto`` is the CPU build where pip finds the locked wheel, else what the registry has.
    """
    if build == "auto":
        with tempfile.TemporaryDirectory() as scratch:
            found = pip("install", "--dry-run", "--quiet", "--no-deps", *torch_alone(Path(scratch)))
        build = "cpu" if found.returncode == 0 else "cuda"
        say(f"torch: the {build} build" + ("" if build == "cpu" else f"; no CPU build here: {last_error(found)}"))
    locks = ["--requirement", str(HERE / f"{build}.lock"), "--requirement", str(DEV)]
    for arguments in (["--require-hashes", *locks], ["--no-build-isolation", "--editable", str(ROOT)]):
        if pip("install", "--no-deps", *arguments, capture=False).returncode:
            sys.exit("rule: the locked packages must install; see pip's error above. Remedy: infra/locks/README.md")
    code = "import torch, deepspeed, ray; print('ready: torch', torch.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def check() -> None:
    """Resolve each lock from the packages' own metadata: exits with the first package that a lock lacks.

    uv follows every requirement of every package and, with ``--require-hashes``, refuses one that no lock names.
    """
    for build in (CPU, CUDA):
        with tempfile.TemporaryDirectory() as scratch:
            if build == CPU:
                got = pip("download", "--quiet", "--no-deps", "--dest", scratch, *torch_alone(Path(scratch)))
                if got.returncode:
                    say(f"cpu.lock: not checked, there is no CPU build of torch here: {last_error(got)}")
                    continue
            where = ["--dry-run", "--quiet", "--target", f"{scratch}/empty", "--find-links", scratch]
            for locks in ((build,), (build, DEV)):
                files = [word for lock in locks for word in ("--requirements", str(lock))]
                uv("install", *where, "--require-hashes", *files)
                say(f"{' + '.join(lock.name for lock in locks)}: every requirement of every package is locked")


def entries(lock: Path) -> dict[str, str]:
    """Return the packages of a lock by name, each with its version, marker and hashes as they stand there."""
    blocks = re.split(r"^(?=\S)", lock.read_text(), flags=re.MULTILINE)
    return {block.split("==")[0]: block for block in blocks if re.match(r"[a-z0-9._-]+==", block)}


def version(entry: str) -> str:
    """Return the version that an entry pins."""
    return entry.split("==")[1].split()[0]


def torch_alone(scratch: Path) -> list[str]:
    """Return pip's arguments that ask for the locked CPU build of torch and nothing else."""
    path = scratch / "torch.txt"
    path.write_text(entries(CPU)["torch"])
    return ["--require-hashes", "--requirement", str(path)]


def pip(action: str, *arguments: str, capture: bool = True) -> subprocess.CompletedProcess[str]:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", action, *arguments]
    return subprocess.run(command, capture_output=capture, text=True, check=False, cwd=ROOT)


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return pip's last line that is an error, or all it said."""
    return next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr.strip())


def uv(action: str, *arguments: str) -> None:
    """Run ``uv pip`` of this environment; its own error is the last word."""
    program = Path(sys.executable).with_name("uv")
    if not program.exists():
        sys.exit(f"rule: the locks are resolved by uv, which {program.parent} does not have. Remedy: make env")
    environment = os.environ | {"VIRTUAL_ENV": str(program.parents[1])}
    done = subprocess.run([str(program), "pip", action, *arguments], check=False, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"rule: pyproject.toml and the locks must resolve (uv pip {action}). Remedy: infra/locks/README.md")


def say(line: str) -> None:
    """Write one line of progress."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
