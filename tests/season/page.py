"""The season's page: metrics a week, what happened, the ledger of champions."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import EvaluationReport, ShardManifest, write_atomic
from pipeline.evaluation.compare import compare
from pipeline.evaluation.score_table import read_scores
from pipeline.promotion.registry import Registry

LAST_WEEKS = 4


@dataclass
class Week:
    """What one week came to.

    Args:
        number: of the week, from 1.
        what: happened in it.
        verdict: of the retraining.
        champion: at its end.
        run: name of its run.
        reasons: of the verdict.
    """

    number: int
    what: str
    verdict: str
    champion: int
    run: str
    reasons: list[str] = field(default_factory=list)


def write_page(
    folder: Path, weeks: list[Week], first: dict[str, EvaluationReport], registry: Registry, samples: int
) -> Path:
    """Write ``season.html`` and ``season.json`` and return the page's path."""
    runs = {week.number: folder / week.run for week in weeks if (folder / week.run / "evaluation.json").is_file()}
    reports = {number: EvaluationReport.read(path / "evaluation.json") for number, path in runs.items()}
    series: dict[str, dict[str, dict[int, float | None]]] = {}
    for number, report in reports.items():
        alone = first.get(runs[number].name)
        for name, result in report.tasks.items():
            lines = series.setdefault(name, {"retrained": {}, "never retrained": {}, "best attainable": {}})
            lines["retrained"][number] = result.value
            lines["best attainable"][number] = result.best_attainable
            if alone is not None and name in alone.tasks:
                lines["never retrained"][number] = alone.tasks[name].value
    gains = [_gain(runs[number], number) for number in sorted(runs)[-LAST_WEEKS:]]
    summary = _summary(gains)
    numbers = {
        "schema": 1,
        "weeks": [vars(week) for week in weeks],
        "series": series,
        "gains": gains,
        "summary": summary,
    }
    write_atomic(folder / "season.json", json.dumps(numbers | {"samples_trained_once": samples}, indent=2) + "\n")
    rows = "".join(
        f"<tr><td>{w.number}</td><td>{html.escape(w.what)}</td><td>{w.verdict}</td><td>{w.champion or '–'}</td>"
        f"<td>{html.escape('; '.join(w.reasons))}</td></tr>"
        for w in weeks
    )
    ledger = "".join(
        f"<tr><td>{e.number}</td><td>{e.action}</td><td>{e.version}</td><td>{e.previous or '–'}</td>"
        f"<td>{html.escape('; '.join(e.why))}</td></tr>"
        for e in registry.ledger.chain()
    )
    text = _PAGE.format(
        plot=_plot(series), rows=rows, ledger=ledger, summary=html.escape(summary["words"]), samples=samples
    )
    write_atomic(folder / "season.html", text)
    return folder / "season.html"


def _gain(run: Path, week: int) -> dict[str, Any]:
    """Compare the retrained model with the first one on a week's holdout days, in pairs."""
    manifest = ShardManifest.read(run / "measured" / "manifest.json")
    mine, alone = (read_scores(run / "measured" / f"scores_{name}.parquet") for name in ("retrained", "first"))
    found = compare(mine, alone, manifest.tasks, candidate_name="retrained", reference_name="never retrained", data={})
    return {
        "week": week,
        "difference": found.macro.difference,
        "standard_error": found.macro.standard_error,
        "retrained": found.macro.candidate,
        "never_retrained": found.macro.reference,
        "best_attainable": float(np.mean([manifest.best_attainable[task] for task in found.tasks])),
        "tasks": sorted(found.tasks),
    }


def _summary(gains: list[dict[str, Any]]) -> dict[str, Any]:
    """Average the last weeks' paired differences; the weeks' samples are independent: errors add in squares."""
    known = [gain for gain in gains if gain["difference"] is not None and gain["standard_error"]]
    if not known:
        return {"words": "no difference is defined"}
    mean = float(np.mean([gain["difference"] for gain in known]))
    error = float(np.sqrt(np.sum([gain["standard_error"] ** 2 for gain in known])) / len(known))
    low, high = mean - 1.96 * error, mean + 1.96 * error
    never, ceiling = (float(np.mean([gain[key] for gain in known])) for key in ("never_retrained", "best_attainable"))
    share = mean / (ceiling - never) if ceiling > never else float("nan")
    words = (
        f"Last {len(known)} retrained weeks, mean of the tasks that the first model knows: retrained "
        f"{never + mean:.3f}, never retrained {never:.3f}, difference {mean:+.3f} [{low:+.3f}, {high:+.3f}] (95 %); "
        f"best attainable {ceiling:.3f}, {share:.0%} of the gap closed."
    )
    return {"difference": mean, "ci95": [low, high], "gap_closed": share, "words": words}


def _plot(series: dict[str, dict[str, dict[int, float | None]]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.4), sharey=True, squeeze=False)
    styles = {"retrained": ("C0", "o-"), "never retrained": ("C3", "s--"), "best attainable": ("0.5", ":")}
    for axis, (task, lines) in zip(axes[0], series.items(), strict=True):
        for name, values in lines.items():
            color, style = styles[name]
            weeks = [week for week, value in sorted(values.items()) if value is not None]
            axis.plot(weeks, [values[week] for week in weeks], style, color=color, label=name)
        axis.set(title=task, xlabel="week", ylim=(0.35, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("AUC (accuracy for query_vertical)")
    axes[0][0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>A season of weekly retraining</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}table{{border-collapse:collapse;width:100%;display:block;overflow-x:auto}}
td,th{{border-bottom:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}}</style>
<h1>A season of weekly retraining</h1><p>{summary}</p>
<p>{samples} samples of passed weeks were trained on along the champion's ancestry, each exactly once.</p>
<img alt="each task's metric a week" src="data:image/png;base64,{plot}">
<h2>Weeks</h2>
<table><tr><th>week</th><th>what happened</th><th>verdict</th><th>champion</th><th>reasons</th></tr>
{rows}</table>
<h2>Ledger</h2>
<table><tr><th>#</th><th>action</th><th>version</th><th>instead of</th><th>why</th></tr>
{ledger}</table></html>
"""
