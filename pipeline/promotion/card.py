"""The model card: what a registered version is for, what it was made from, and how well it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.contracts import EvaluationReport, TaskSpec


def model_card(
    name: str,
    tasks: Sequence[TaskSpec],
    base: str,
    report: EvaluationReport | None,
    lineage: Mapping[str, str],
    limits: Sequence[str] = (),
) -> str:
    """Return the card in Markdown.

    Args:
        name: of the model.
        tasks: what it answers.
        base: the frozen model under the adapter, in words.
        report: its evaluation.
        lineage: what it was made from, by name.
        limits: what it should not be used for.
    """
    lines = [
        f"# {name}",
        "",
        f"A multi-task adapter (MTL-LoRA, arXiv 2410.09437) of {base}. It answers {len(tasks)} tasks, mixed in one "
        "call: `predict` takes a DataFrame with a `task` column and the texts that the task reads.",
        "",
        "## Tasks",
        "",
        "| task | kind | reads | answers |",
        "|---|---|---|---|",
    ]
    for task in tasks:
        words = ", ".join(word.strip() for word in task.label_words[:8]) + (" …" if len(task.label_words) > 8 else "")
        fields = ", ".join(f"`{field}`" for field in task.text_fields)
        lines.append(f"| {task.name} | {task.kind} | {fields} | {words or 'one of its choices'} |")
    lines += ["", "## Evaluation", "", *_evaluation(report), "", "## Made from", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in lineage.items() if value] or ["- not recorded"]
    lines += ["", "## Limits", ""]
    lines += [f"- {limit}" for limit in limits] or [
        "- The scores are probabilities among the task's own answers; a text of another kind still gets one of them.",
        "- It was evaluated on the test split named above; other traffic needs its own evaluation.",
    ]
    return "\n".join(lines) + "\n"


def _evaluation(report: EvaluationReport | None) -> list[str]:
    if report is None:
        return ["Not evaluated."]
    lines = ["| task | metric | value | 95 % interval | samples |", "|---|---|---|---|---|"]
    for name, result in report.tasks.items():
        value = "undefined" if result.value is None else f"{result.value:.4f}"
        interval = result.reason or "" if result.ci95 is None else f"{result.ci95[0]:.4f} – {result.ci95[1]:.4f}"
        lines.append(f"| {name} | {result.metric} | {value} | {interval} | {result.n} |")
    if report.macro.value is not None:
        lines += ["", f"Macro mean {report.macro.value:.4f}, over {report.macro.averages}."]
    return lines
