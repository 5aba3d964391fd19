"""Does any mutated input end in anything but a result or a typed error?"""

import contextlib
import json
import multiprocessing
import os
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from pipeline.contracts import write_atomic
from pipeline.progress import say
from tests.benchmarks.timing import hardware, row, versions
from tests.hostile.drive import LONGEST_S, MOST_BYTES, Found, drive, own_folder
from tests.hostile.surfaces import SURFACES

SEED = 0
SHARES = {
    "image": 250_000,
    "messages": 120_000,
    "tags": 120_000,
    "ledger": 120_000,
    "requests": 80_000,
    "manifest": 70_000,
    "parquet": 50_000,
    "csv": 50_000,
    "jsonl": 40_000,
    "tar": 30_000,
    "index": 20_000,
    "adapter": 20_000,
    "gates": 12_000,
    "run_folder": 8_000,
    "answers": 5_000,
    "checkpoint": 4_000,
    "configuration": 1_000,
}
"""Inputs of each surface: a million together, most where one takes least."""
_ROUNDS = 100
"""All surfaces go on side by side: what is stopped early has looked at each."""
_KEPT = Path(".cache") / "hostile"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {name: Found().plain() for name in SURFACES}


def _work(path: Path, surface: Any, number: Any) -> None:
    """Go on where the kept counts end, round by round; the input that is looked at stands in shared memory."""
    os.nice(10)
    path = path.absolute()
    known = _read(path)
    with contextlib.ExitStack() as ended:
        doors = {}
        for name, made in SURFACES.items():
            folder = ended.enter_context(own_folder())
            doors[name] = (made(folder), folder)
        for turn in range(1, _ROUNDS + 1):
            for place, (name, (put, folder)) in enumerate(doors.items()):
                counted = known[name]
                numbers = range(counted["inputs"], SHARES[name] * turn // _ROUNDS)
                os.chdir(folder)
                found = Found(**counted)
                for each in drive(name, put, folder, SEED, numbers, found):
                    surface.value, number.value = place, each
                known[name] = found.plain()
                write_atomic(path, json.dumps(known))
            faults = sum(len(counted["faults"]) for counted in known.values())
            say(f"{sum(counted['inputs'] for counted in known.values()):,} inputs, {faults} faults")


def _note_death(path: Path, surface: "Synchronized[int]", number: "Synchronized[int]", code: int) -> None:
    """Count an input that ended the whole process, and what was looked at before it in its round."""
    known = _read(path)
    name = list(SURFACES)[surface.value]
    counted = known[name]
    counted["faults"].append(f"{name} {SEED} {number.value}: the process ended with {code}")
    counted["inputs"] = number.value + 1
    write_atomic(path, json.dumps(known))


def run() -> dict[str, Any]:
    """Look at a million inputs; stopped by Ctrl-C it returns what there is, and goes on from there the next time."""
    path, begun = _KEPT / f"seed-{SEED}.json", time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    surface, number = context.Value("i", 0), context.Value("i", 0)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            worker = context.Process(target=_work, args=(path, surface, number))
            worker.start()
            worker.join()
            if worker.exitcode == 0:
                break
            if worker.exitcode is None or worker.exitcode > 0:
                raise RuntimeError(f"the harness itself failed, its process ended with {worker.exitcode}")
            _note_death(path, surface, number, worker.exitcode)
    return _result(_read(path)) | {"run_s": round(time.monotonic() - begun, 1)}


def _result(known: dict[str, Any]) -> dict[str, Any]:
    rows = [
        row(
            f"faults, {name}",
            "0",
            len(counted["faults"]),
            not counted["faults"],
            inputs=counted["inputs"],
            typed_refusals=counted["refused"],
            accepted=counted["accepted"],
            longest_s=round(counted["longest_s"], 3),
            peak_mib=counted["peak_bytes"] >> 20,
            seed=SEED,
            first_faults=counted["faults"][:3],
        )
        for name, counted in known.items()
    ]
    inputs = sum(counted["inputs"] for counted in known.values())
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks hostile",
        "hardware": hardware(),
        "versions": versions("pyarrow", "pillow", "pydantic", "omegaconf", "safetensors", "numpy"),
        "protocol": (
            f"one process; an input may take {LONGEST_S:g} s of processor time and {MOST_BYTES >> 20} MiB, touch no "
            "file outside its folder, start no program and unpickle nothing; refusals are the product's typed errors"
        ),
        "rows": [row("inputs in all", f">= {sum(SHARES.values())}", inputs, inputs >= sum(SHARES.values())), *rows],
    }
