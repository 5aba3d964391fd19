"""Checks of this machine: versions, compiler, processors, memory, GPU, ports, shared memory, targets of notices."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from jobs.config import RunConfig
from jobs.doctor.finding import Finding, Status, first_line
from jobs.notices import NoticesConfig, targets

LOCKS = Path(__file__).resolve().parents[2] / "infra" / "locks"
SHARED_MEMORY = Path("/dev/shm")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(;?)")
_PYTHON = ((3, 11), (3, 13))
_PORTS = {8000: "mtl-lora serve"}
"""Usual numbers that nothing takes the next one of by itself, as Ray does of its dashboard's."""
_COMPILE_S = 20


def machine(config: RunConfig) -> Iterator[Finding]:
    """Look at this machine."""
    yield python_version()
    yield package_versions(LOCKS)
    yield c_compiler()
    yield processors(config)
    yield memory()
    yield gpu()
    yield shared_memory(config, SHARED_MEMORY)
    yield notices(config.notices)


def python_version(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Whether Python is one that the packages are locked for."""
    found, (least, below) = ".".join(map(str, version)), _PYTHON
    if least <= version < below:
        return Finding("Python", found)
    return Finding("Python", found, "fail", "use Python 3.11 or 3.12: make env PYTHON=/path/to/python3.11")


def package_versions(locks: Path) -> Finding:
    """Whether the installed packages are those of the locks, in the build of torch that is installed."""
    what = "packages"
    if not (locks / "runtime.lock").is_file():
        remedy = "install from a checkout, make env, to run what was tested"
        return Finding(what, "no lock stands beside this installation to compare with", "warn", remedy)
    installed = {_normal(each.metadata["Name"]): each.version for each in distributions()}
    torch_lock = "cpu.lock" if installed.get("torch", "").endswith("+cpu") else "cuda.lock"
    wanted: dict[str, tuple[str, bool]] = {}
    for lock in ("runtime.lock", torch_lock):
        for line in (locks / lock).read_text().splitlines():
            if pin := _PIN.match(line):
                wanted[_normal(pin[1])] = (pin[2], bool(pin[3]) or lock == "cuda.lock")
    others = [
        f"{name} {installed.get(name, 'missing')} instead of {version}"
        for name, (version, is_for_some) in wanted.items()
        if (name in installed or not is_for_some) and _public(installed.get(name, "")) != _public(version)
    ]
    if not others:
        return Finding(what, f"all {len(wanted)} as locked")
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    status: Status = "fail" if any(" missing " in each for each in others) else "warn"
    return Finding(what, "; ".join(others[:5]) + more, status, "make -B env installs what is locked")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _public(version: str) -> str:
    return version.partition("+")[0]


def c_compiler() -> Finding:
    """Whether a C compiler makes a program that runs: torch and DeepSpeed build parts of themselves with one."""
    command = shlex.split(os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc"))
    what, remedy = "C compiler", "install one, apt-get install gcc, or name one in CC"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "main.c", Path(folder) / "main"
        source.write_text('#include <stdio.h>\nint main(void) { return printf("42") != 2; }\n')
        try:
            for step in ([*command, str(source), "-o", str(program)], [str(program)]):
                subprocess.run(step, check=True, capture_output=True, timeout=_COMPILE_S)
        except (OSError, subprocess.SubprocessError) as error:
            return Finding(what, f"{' '.join(command)} makes no program that runs: {first_line(error)}", "fail", remedy)
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return Finding(what, f"{' '.join(command)} works, Python.h is missing", "warn", "install python3-dev")
    return Finding(what, f"{' '.join(command)} works")


def processors(config: RunConfig) -> Finding:
    """Whether there is a CPU for each rank, and how many threads a process without Ray takes."""
    cpus, ranks = len(os.sched_getaffinity(0)), config.training.num_workers
    found = f"{cpus} for {ranks} ranks, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if ranks > cpus and not _joins_a_cluster(config) and not _has_gpu():
        return Finding("CPUs", found, "fail", f"set training.num_workers to {cpus} or less, or name ray.address")
    return Finding("CPUs", found)


def _joins_a_cluster(config: RunConfig) -> bool:
    return (config.ray.address or os.environ.get("RAY_ADDRESS", "")) not in ("", "local")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def memory(least: int = 4 * 2**30) -> Finding:
    """Whether memory for the smallest run is free, of the machine or of the container.

    Args:
        least: bytes.
    """
    from pipeline.training.planner import available_bytes

    free = available_bytes()
    if free < least:
        remedy = "end other programs, or raise the container's limit; mtl-lora plan says what a run takes"
        return Finding("memory", f"{_gibibytes(free)} free", "warn", remedy)
    return Finding("memory", f"{_gibibytes(free)} free")


def gpu(devices: Path = Path("/dev")) -> Finding:
    """Whether torch sees the GPUs that the machine has."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding(
            "GPU", f"{', '.join(names)}, CUDA {torch.version.cuda}, {_gibibytes(torch.cuda.mem_get_info()[0])} free"
        )
    if (devices / "nvidia0").exists():
        remedy = "make -B env TORCH=cuda, and check the driver with nvidia-smi"
        return Finding("GPU", f"there is one, torch {torch.__version__} does not see it", "fail", remedy)
    return Finding("GPU", "none; training runs on the CPU")


def shared_memory(config: RunConfig, place: Path) -> Finding:
    """Whether Ray's object store fits into shared memory; else it lies on disk."""
    what, need = f"shared memory {place}", config.ray.object_store_mb * 2**20
    remedy = "give the container more, docker run --shm-size=2g, or lower ray.object_store_mb"
    if not place.is_dir():
        return Finding(what, "is missing", "fail", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    if free < need:
        return Finding(what, f"{_gibibytes(free)} free, Ray's object store takes {_gibibytes(need)}", "warn", remedy)
    return Finding(what, f"{_gibibytes(free)} free")


def notices(config: NoticesConfig) -> Finding:
    """Whether what the environment names can be targets of notices; nothing is sent."""
    found, refused = targets(config)
    if refused:
        return Finding("notices", "; ".join(refused), "warn", f"set {config.webhook_env} anew")
    return Finding("notices", ", ".join(found) or f"{config.webhook_env} is not set: they are logged alone")


def ports() -> Iterator[Finding]:
    """Whether the ports that have a usual number are free on the loopback, and whether any is."""
    try:
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
    except OSError as error:
        remedy = "let programs listen on 127.0.0.1: Ray and the ranks meet there"
        yield Finding("loopback", f"no port can be opened: {error}", "fail", remedy)
        return
    for port, whose in _PORTS.items():
        yield port_is_free(port, whose)


def port_is_free(port: int, whose: str) -> Finding:
    """Whether a port can be listened to on the loopback.

    Args:
        port: its number.
        whose: the program in words.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "another program listens there; end it, or name another --port"
            return Finding(f"port {port}", f"{first_line(error)}: wanted by {whose}", "warn", remedy)
    return Finding(f"port {port}", f"free, for {whose}")


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
