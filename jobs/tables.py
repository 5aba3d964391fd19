"""What a verb shows a person at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipeline.contracts import Comparison, Difference, EvaluationReport, PromotionDecision, TaskResult
from pipeline.ingestion.drift import DriftReport
from pipeline.modeling.size_plan import AdapterSizes, MethodSize
from pipeline.progress import console, say, sparkline

_WIDTH = 140
"""Columns of a table that is written where no terminal is."""

if TYPE_CHECKING:
    from pipeline.serving.batch_output import ScoreManifest
    from pipeline.training.memory import MemoryPlan


def show_plan(numbers: dict[str, Any]) -> None:
    """Show the plan of a training run."""
    epoch = numbers["epoch"]
    title = f"{numbers['steps']} steps, {numbers['samples']:,} samples; an epoch has {epoch['steps']:,} steps"
    table = Table(title=title, caption=f"schedule {epoch['schedule_sha256'][:16]}", show_footer=True)
    totals = (
        *("all", f"{epoch['samples']:,}", f"{sum(numbers['test_samples'].values()):,}", f"{epoch['shards']:,}"),
        *(_mebibytes(epoch["bytes"]), "", "", "", "", f"{epoch['padding_share']:.1%}"),
    )
    columns = ("task", "train samples", "test samples", "shards", "MiB", "share asked", "given", "epochs", "length")
    padding = "padding saved" if numbers["packed_rows"] else "padding"
    for column, total in zip((*columns, padding), totals, strict=True):
        table.add_column(column, justify="left" if column == "task" else "right", footer=total)
    for task, plan in epoch["tasks"].items():
        table.add_row(
            *(task, f"{plan['samples']:,}", f"{numbers['test_samples'][task]:,}", f"{plan['shards']:,}"),
            *(_mebibytes(plan["bytes"]), f"{plan['requested_share']:.2%}", f"{plan['given_share']:.2%}"),
            *(f"{plan['epochs']:.2f}", f"{plan['mean_length']:.1f}", f"{plan['padding_share']:.1%}"),
        )
    _print(table)
    if (sizes := numbers["adapter"]) is not None:
        show_sizes(AdapterSizes.model_validate(sizes))
    _show_cost(numbers["training"])


def show_memory(found: MemoryPlan) -> None:
    """Show what a rank holds under each layout, and the smallest device that does."""
    ranks = [1, 2, 8, 64, 512]
    again = ", checkpointed" if found.activation_checkpointing else ""
    table = Table(
        title=f"GiB a rank of {found.parameters / 1e9:.2f} billion parameters, {found.trained_parameters:,} trained",
        caption=f"{found.micro_batch_tokens:,} tokens a micro-batch{again}; in brackets the smallest device that fits, "
        "of 24, 40, 80 and 141 GiB",
    )
    table.add_column("")
    for number in ranks:
        table.add_column(f"{number} rank{'s' * (number > 1)}", justify="right")
    for layout in dict.fromkeys(cell.layout for cell in found.cells):
        cells = [found.cell(layout, number) for number in ranks]
        table.add_row(layout, *(f"{c.device_bytes / 2**30:.1f} [{c.fits_gib or '-'}]" for c in cells))
    _print(table)


def show_sizes(found: AdapterSizes) -> None:
    """Show what each method counts at the size asked for, and say where the one that is trained misses it."""
    asked = f"{found.parameters:,} parameters, as {found.like} of r {found.like_r} has with {found.tasks} tasks"
    table = Table(title=f"adapter.size: {asked}")
    for column in ("method", "r", "parameters", "share of the base", "ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for size in found.methods:
        table.add_row(*size_cells(size), style="bold" if size.method == found.trained.method else None)
    if found.is_kept:
        name, *cells = size_cells(found.trained)
        table.add_row(f"{name}, kept", *cells, style="bold")
    _print(table)
    if found.remark:
        say(found.remark)


def size_cells(size: MethodSize) -> tuple[str, ...]:
    """Return a method's size in words: method, rank, parameters, share, ratio."""
    near = "" if size.is_met else " nearest"
    return size.method, str(size.r), f"{size.parameters:,}", f"{size.share:.3%}", f"{size.ratio:.3f}{near}"


def _show_cost(found: dict[str, Any]) -> None:
    table = Table(title="Training, measured on a few micro-batches" if found["calibration"] else "Training, estimated")
    for column in ("tokens", "computed", "time", "memory a rank, MiB", "a checkpoint, MiB", "trained parameters"):
        table.add_column(column, justify="right")
    minutes, seconds = divmod(round(found["seconds"] + found["validation_seconds"]), 60)
    table.add_row(
        *(f"{found['tokens']:,}", f"{found['computed_share']:.1%}", f"{minutes} min {seconds} s"),
        *(_mebibytes(found["rank_bytes"]), _mebibytes(found["checkpoint_bytes"])),
        f"{found['trained_parameters']:,} of {found['parameters']:,}",
    )
    _print(table)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def show_drift(found: DriftReport) -> None:
    """Show the measures of each task that have drifted, those past a threshold marked with what they ask for."""
    table = Table(title="Drift from the earlier data")
    measures = list(next(iter(found.tasks.values()), ()))
    for column in ("task", *measures):
        table.add_column(column.replace("_", " "), justify="left" if column == "task" else "right")
    for task, measured in found.tasks.items():
        marks = {"ok": "", "warn": " warn", "hold": " hold"}
        table.add_row(task, *(f"{m.value:.3f}{marks[m.verdict]}" for m in measured.values()))
    _print(table)


def show_training(history: Sequence[Mapping[str, Any]]) -> None:
    """Show how each task's loss came down, from the rows of a training log (``step``, ``loss``, ``task_loss``)."""
    if len(history) < 2:
        return
    curves = {"all": [row["loss"] for row in history]}
    for task in dict.fromkeys(task for row in history for task in row.get("task_loss", {})):
        curves[task] = [row["task_loss"][task] for row in history if row["task_loss"].get(task) is not None]
    table = Table(title=f"Loss over {history[-1]['step']} steps")
    for column in ("task", "first", "course", "last"):
        table.add_column(column, justify="right" if column in ("first", "last") else "left")
    for name, losses in curves.items():
        if losses:
            table.add_row(name, f"{losses[0]:.3f}", sparkline(losses), f"{losses[-1]:.3f}")
    _print(table)


def show_evaluation(trained: EvaluationReport, base: EvaluationReport | None) -> None:
    """Show each task's metric: untrained, reached with its interval, best attainable where that is known."""
    known_best = any(result.best_attainable is not None for result in trained.tasks.values())
    table = Table(title=f"{trained.model}: test metrics with 95 % intervals")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("samples", justify="right")
    if base is not None:
        table.add_column("untrained", justify="right")
    table.add_column("trained", justify="right", style="bold")
    if known_best:
        table.add_column("best attainable", justify="right")
    for name, result in trained.tasks.items():
        cells = [name, str(result.metric), str(result.n)]
        if base is not None:
            cells.append(_cell(base.tasks[name]) if name in base.tasks else "–")
        cells.append(_cell(result))
        if known_best:
            cells.append("–" if result.best_attainable is None else f"{result.best_attainable:.3f}")
        table.add_row(*cells)
    _print(table)


def show_comparison(found: Comparison) -> None:
    """Show the paired differences between two models, task by task."""
    table = Table(title=f"{found.candidate} less {found.reference}: paired differences with 95 % intervals")
    for column in ("task", "metric", "samples", "difference", "verdict"):
        table.add_column(column, justify="right" if column in ("samples", "difference") else "left")
    for name, task in found.tasks.items():
        table.add_row(name, str(task.metric), str(task.n), _difference(task), task.verdict)
    for name, model in found.only_one.items():
        table.add_row(name, "", "", "", f"answered by {model} alone")
    table.add_section()
    table.add_row("macro mean", "", "", _difference(found.macro), "")
    _print(table)


def _difference(found: Difference) -> str:
    if found.difference is None:
        return f"undefined: {found.reason}"
    interval = f" [{found.ci95[0]:+.3f}, {found.ci95[1]:+.3f}]" if found.ci95 else ""
    return f"{found.difference:+.3f}{interval}"


def show_decision(decision: PromotionDecision) -> None:
    """Show a promotion decision with its reasons and what it rests on."""
    console.print(f"[bold]{decision.verdict}[/bold] {decision.candidate}", soft_wrap=True)
    for words in (*decision.reasons, *decision.evidence):
        console.print(f"  {words}", markup=False, soft_wrap=True)


def show_scores(manifest: ScoreManifest, output: str) -> None:
    """Show what batch scoring has written."""
    say(f"{manifest.rows:,} rows scored by {manifest.model}, {manifest.rejected:,} put aside: {output}")
    for reason, rows in manifest.reasons.items():
        say(f"  {rows:,} put aside: {reason}")


def _cell(result: TaskResult) -> str:
    if result.value is None:
        return f"undefined: {result.reason}"
    interval = f" [{result.ci95[0]:.3f}, {result.ci95[1]:.3f}]" if result.ci95 else ""
    return f"{result.value:.3f}{interval}"


def _print(table: Table) -> None:
    # In a job's log there is no terminal to ask for its width; a table cut to 80 columns could not be read.
    width = int(os.environ.get("COLUMNS", _WIDTH))
    wide = console if console.is_terminal else Console(file=console.file, width=width, highlight=False)
    wide.print(table)


def show_jobs(jobs: list[dict[str, Any]]) -> None:
    """Show submitted jobs."""
    table = Table()
    for column in ("job", "state", "exit code", "started", "ended"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        cells = (job["job"], job["state"], job["exit_code"], job["started"], job["ended"])
        table.add_row(*("–" if cell is None else str(cell) for cell in cells))
    _print(table)


def show_lineage(rows: dict[str, Any]) -> None:
    """Show where a version comes from, a line a fact."""
    for name, value in rows.items():
        say(f"{name:>18}  {value}")
