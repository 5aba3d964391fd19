"""The model card: what a registered version is for, what it was made from, and how well it answers."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pipeline.contracts import EvaluationReport, TaskSpec
from pipeline.promotion.provenance import Provenance

_UNNAMED = {"choice": "one of its choices", "regression": "a number", "generation": "a text that it writes"}


def model_card(
    name: str,
    tasks: Sequence[TaskSpec],
    report: EvaluationReport | None,
    provenance: Provenance,
    limits: Sequence[str] = (),
) -> str:
    """Return the card in Markdown.

    Args:
        name: of the model.
        tasks: what it answers.
        report: its evaluation.
        provenance: what it was made from.
        limits: what it should not be used for.
    """
    lines = [
        f"# {name}",
        "",
        f"A multi-task adapter (MTL-LoRA, arXiv 2410.09437) of {_cell(provenance.base) or 'a frozen model'}. It "
        f"answers {len(tasks)} tasks, mixed in one call: `predict` takes a DataFrame with a `task` column and the "
        "texts that the task reads.",
        "",
        "## Tasks",
        "",
        "| task | kind | reads | answers |",
        "|---|---|---|---|",
    ]
    for task in tasks:
        names = [_cell(word.strip()) for word in task.class_names[:8]]
        words = ", ".join(names) + (" …" if len(task.class_names) > 8 else "")
        fields = ", ".join(f"`{_cell(field)}`" for field in task.text_fields)
        lines.append(f"| {task.name} | {task.kind} | {fields} | {words or _UNNAMED.get(task.kind, '')} |")
    lines += ["", "## Evaluation", "", *_evaluation(report), "", "## Made from", ""]
    lines += [f"- {name.replace('_', ' ')}: {_cell(text)}" for name, text in provenance.shown().items()]
    lines += ["", "## Limits", ""]
    lines += [f"- {limit}" for limit in limits] or [
        "- The scores are probabilities among the task's own answers; a text of another kind still gets one of them.",
        "- It was evaluated on the test split named above; other traffic needs its own evaluation.",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text as it stands in a table of Markdown: no markup, no further column and no further line."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def _evaluation(report: EvaluationReport | None) -> list[str]:
    if report is None:
        return ["Not evaluated."]
    lines = ["| task | metric | value | 95 % interval | samples |", "|---|---|---|---|---|"]
    for name, result in report.tasks.items():
        value = "undefined" if result.value is None else f"{result.value:.4f}"
        interval = _cell(result.reason or "") if result.ci95 is None else f"{result.ci95[0]:.4f} – {result.ci95[1]:.4f}"
        lines.append(f"| {name} | {result.metric} | {value} | {interval} | {result.n} |")
    if report.macro.value is not None:
        lines += ["", f"Macro mean {report.macro.value:.4f}, over {report.macro.averages}."]
    return lines
