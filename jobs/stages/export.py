"""Trained adapter → one plain PEFT LoRA a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.run import Run
from pipeline.progress import Track
from pipeline.stream import load_manifest, read_split


def export(run: Run, adapter: Path) -> dict[str, Path]:
    """Write each task as a plain PEFT LoRA folder, compared by logits with the multi-task model first.

    Args:
        run: whose tasks are exported.
        adapter: folder of its trained adapter.

    Returns:
        Task → its folder.
    """
    from pipeline.modeling.predictor import Predictor

    config = run.config
    predictor = Predictor.load(adapter, "cpu")
    adapted: Any = predictor.scorer.model.adapted
    split, manifest = config.evaluation.split, load_manifest(config.manifest_path)[0]
    folders = {}
    with Track("export", len(config.tasks), "tasks") as track:
        for task in config.tasks:
            shown = split if manifest.samples_of(task.name, split) else "train"
            sample = next(iter(read_split(config.manifest_path, shown, task=task.name, cache=config.cache)))
            batch = predictor.scorer.encoder.collate(predictor.scorer.encoder.encode([sample]))
            input_ids, attention_mask, *_ = batch.padded()
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            folders[task.name] = adapted.export_task(task.name, run.folder.export(task.name), inputs)
            track.advance()
    return folders


def standing(run: Run) -> dict[str, Path]:
    """Return the exported folders, by task.

    Raises:
        InputError: one is missing.
    """
    folders = {task.name: run.folder.export(task.name) for task in run.config.tasks}
    for folder in folders.values():
        run.folder.needs(folder / "adapter_config.json", "export")
    return folders
