"""Run benchmarks: ``python -m tests.benchmarks [NAME ...]``.

Every module of this package with a function ``run`` is one. It returns
``{"question", "hardware", "versions", "rows": [{"measure", "goal", "value", "met"}], ...}``. A table goes to the
screen, the whole result to ``results/NAME.json``, and one JSON document with all of them last to standard output.
"""

import argparse
import importlib
import json
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

import tests.benchmarks as package

RESULTS = Path(__file__).parent / "results"


def discover() -> dict[str, str]:
    """Return the modules of this package with a ``run`` of their own, without importing them."""
    folder = Path(__file__).parent
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
    return {n: f"{package.__name__}.{n}" for n in names if "\ndef run()" in (folder / f"{n}.py").read_text()}


def show(name: str, result: dict[str, Any]) -> None:
    """Print a result as a table."""
    rows = result.get("rows", [])
    width = max((len(str(row["measure"])) for row in rows), default=10)
    print(f"\n{name}: {result.get('question', '')}")
    print(f"  {'measure':<{width}}  {'goal':>12}  {'value':>10}  met")
    for row in rows:
        met = {True: "yes", False: "NO", None: "-"}[row["met"]]
        print(f"  {row['measure']:<{width}}  {row['goal']!s:>12}  {row['value']!s:>10}  {met}")


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; return 0 when each ran, goals met or not."""
    known = discover()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; none runs all")
    names = parser.parse_args(arguments).names or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"a benchmark must be known, got {unknown}; there are {sorted(known)}")
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            result = importlib.import_module(known[name]).run()
        except Exception as error:  # noqa: BLE001 - one benchmark that cannot run here must not hide the others
            failed.append(name)
            result = {"question": "did not run", "error": f"{type(error).__name__}: {error}", "rows": []}
            print(f"\n{name}: did not run: {result['error']}", file=sys.stderr)
        result["benchmark_s"] = round(time.perf_counter() - start, 1)
        results[name] = result
        if name not in failed:
            show(name, result)
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
