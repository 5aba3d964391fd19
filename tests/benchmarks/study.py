"""The tables of comparisons of methods as benchmark results, and the README's short table of them.

``python -m tests.benchmarks.study CONFIG FOLDER`` puts what the study of a packaged configuration has left in its
folder into ``results/study_CONFIG.json``, and the main study's table into the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jobs.study.figures import FIGURES
from pipeline.contracts import write_atomic
from pipeline.study.comparison import holm
from tests.benchmarks.timing import hardware, row, versions

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
MAIN = "standard"
"""The study that the README shows."""
BEGIN, END = "<!-- the comparison's table: python -m tests.benchmarks.study -->\n", "<!-- end of the table -->\n"
COLUMNS = {
    "lora": "LoRA, told nothing",
    "lora_task_word": "LoRA, task word",
    "lora_per_task": "one LoRA a task",
    "moelora": "MoELoRA",
}
"""The arms that the README shows beside the best MTL-LoRA recipe."""


def result(config: str, folder: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a study's tables as a benchmark's result.

    Args:
        config: name of the study's packaged configuration.
        folder: that the study has left.
        known: the result so far, whose other suites stay: a study may be run a suite at a time, on several machines.
    """
    found, known = json.loads((folder / "study.json").read_text()), known or {}
    suites = {suite["name"]: suite for suite in found["suites"]}
    untrained = known.get("untrained", {}) | {name: round(_mean(of["untrained"]), 4) for name, of in suites.items()}
    arms = [shown for shown in known.get("rows", ()) if shown.get("suite", next(iter(suites))) not in suites]
    arms += [_arm(suite, arm) for suite in suites.values() for arm in suite["arms"]]
    compared = [shown for shown in arms if "p" in shown]
    for shown, p in zip(compared, holm([shown["p"] for shown in compared]), strict=True):
        shown["p_holm"] = round(p, 4)
    machine = hardware()
    cost = known.get("cost", {}) | {name: {**_cost(folder, name), "hardware": machine} for name in suites}
    return {
        "question": "At equal size, each method at its own searched learning rate: what does each reach?",
        "command": f"mtl-lora study --config {config} data_root=path/to/data",
        "hardware": machine,
        "versions": versions("torch", "deepspeed"),
        "protocol": " ".join(found["notes"]),
        "cost": cost,
        "untrained": untrained,
        **(_figures(folder) or {key: known[key] for key in ("figures",) if key in known}),
        "rows": [*(_reach(arms, untrained) if any(shown["is_recipe"] for shown in arms) else []), *arms],
    }


def _figures(folder: Path) -> dict[str, Any]:
    """Return the numbers of a study's figures, where they were drawn: the points of the planes stay on its page."""
    path = folder / FIGURES
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    told: dict[str, Any] = {
        "command": "mtl-lora study ... --figures",
        "features": {
            arm["title"]: {key: round(arm[key], 3) for key in ("silhouette", "probe")}
            for arm in found["features"]["arms"]
        },
        "sharing": {
            arm["title"]: {
                "gradient_cosine": {pair: round(value, 3) for pair, value in arm["cosine"].items()},
                "mixing": {task: [round(weight, 3) for weight in of] for task, of in arm["mixing"].items()},
            }
            for arm in found["sharing"]["arms"]
        },
    }
    if "latency" in found:
        told["latency"] = found["latency"]
    return {"figures": {**told, "notes": [found[key]["note"] for key in ("features", "sharing")]}}


def _reach(arms: list[dict[str, Any]], untrained: dict[str, float]) -> list[dict[str, Any]]:
    def named(of: list[dict[str, Any]]) -> list[str]:
        return [f"{shown['suite']}: {shown['arm']}" for shown in of]

    above = [shown["suite"] for shown in arms if shown["is_recipe"] and shown["ci95"][0] > 0]
    edges = named([shown for shown in arms if shown["at_edge"]])
    below = named([shown for shown in arms if not shown["value"] > untrained[shown["suite"]]])
    measure = (
        "suites on which the best MTL-LoRA recipe is above the best LoRA arm of equal size, the interval above zero"
    )
    return [
        row(f"{measure}, of {len(untrained)}", ">= 3", len(above), len(above) >= 3, suites=above),
        row(
            f"arms whose searched rate lies at an edge of their grid, of {len(arms)}",
            "0",
            len(edges),
            not edges,
            arms=edges,
        ),
        row(f"arms that do not beat the untrained model, of {len(arms)}", "0", len(below), not below, arms=below),
    ]


def _arm(suite: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    metrics = ", ".join(sorted(set(suite["metrics"].values())))
    told: dict[str, Any] = {
        "suite": suite["name"],
        "arm": arm["name"],
        "spread": round(arm["spread"], 4),
        "tasks": {task: round(value, 4) for task, value in arm["tasks"].items()},
        "rate": arm["rate"],
        "at_edge": arm["at_edge"],
        "development": {f"{float(rate):g}": round(value, 4) for rate, value in arm["curve"].items()},
        "parameters": arm["parameters"],
        "size_ratio": round(arm["size_ratio"], 3),
        "is_recipe": arm["name"] == suite["recipe"],
    }
    if (difference := arm["difference"]) is not None:
        told |= {"reference": suite["reference"], "difference": round(difference["value"], 4)}
        told |= {key: [round(end, 4) for end in difference[key]] for key in ("ci95", "ci95_tasks")}
        told |= {"p": round(difference["p"], 4), "p_holm": round(difference["p_holm"], 4)}
    measure = f"{suite['name']}: {arm['title']}, mean of {len(arm['tasks'])} tasks ({metrics}), {suite['seeds']} seeds"
    return row(measure, "none", arm["mean"], None, **told)


def _cost(folder: Path, suite: str) -> dict[str, float]:
    rows = [json.loads(path.read_text()) for path in (folder / "rows" / suite).glob("*/*/row.json")]
    seconds = sum(found["train_s"] + found["score_s"] for found in rows)
    return {"runs": len(rows), "minutes": round(seconds / 60, 1)}


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def readme_table() -> str:
    """Return the README's table from the results of the main study: a line a suite."""
    found = json.loads((RESULTS / f"study_{MAIN}.json").read_text())
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    for shown in found["rows"]:
        if "arm" in shown:
            arms.setdefault(shown["suite"], {})[shown["arm"]] = shown
    head = ["suite", "untrained", *COLUMNS.values(), "best MTL-LoRA", "over the best LoRA arm [95 %]"]
    lines = [head, ["---"] * len(head)]
    for suite, of in arms.items():
        recipe = next((arm for arm in of.values() if arm["is_recipe"]), None)
        cells = [f"{of[name]['value']:.3f}" if name in of else "–" for name in COLUMNS]
        best = ["–", "–"]
        if recipe is not None:
            low, high = recipe["ci95"]
            best = [f"{recipe['value']:.3f}", f"{recipe['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append([f"`{suite}`", f"{found['untrained'][suite]:.3f}", *cells, *best])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_table(text: str) -> str:
    """Return the README with its table as the results have it."""
    before, begins, rest = text.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ValueError(f"the README must hold the lines {BEGIN!r} and {END!r}, got neither or one; put them back")
    return f"{before}{BEGIN}{readme_table()}{END}{after}"


def main(arguments: list[str]) -> None:
    """Write one study's results, and the README's table."""
    config, folder = arguments[0], Path(arguments[1])
    path = RESULTS / f"study_{config}.json"
    known = json.loads(path.read_text()) if path.is_file() else None
    write_atomic(path, json.dumps(result(config, folder, known), indent=2) + "\n")
    if config == MAIN:
        write_atomic(README, with_table(README.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
