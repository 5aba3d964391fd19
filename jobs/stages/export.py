"""Trained adapter → one plain PEFT LoRA a task, and how they are asked and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.run import Run
from pipeline.progress import Track, say
from pipeline.stream import load_manifest, read_split


def export(run: Run, adapter: Path) -> dict[str, Path]:
    """Write each task as a plain PEFT LoRA folder, compared by logits with the multi-task model first.

    Each folder holds ``task.json``, how the task is asked; ``serving.json``, written last, how all are served.

    Args:
        run: whose tasks are exported.
        adapter: folder of its trained adapter.

    Returns:
        Task → its folder.
    """
    from mtl_lora.serving import serving_notice, write_serving
    from pipeline.modeling.answering import sample_encoder
    from pipeline.modeling.classifier import export_task
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
    from pipeline.serving.base import served_base
    from pipeline.serving.exported_task import TASK_FILE, ExportedTask
    from pipeline.serving.offloaded_base import adapter_to_export

    config = run.config
    spec = PredictorSpec.read(adapter / PREDICTOR_FILE)
    encoder, base_config = sample_encoder(spec.base, spec.tasks), spec.base
    split, manifest = config.evaluation.split, load_manifest(config.manifest_path)[0]
    folders = {}
    with (
        adapter_to_export(base_config, adapter, [task.name for task in spec.tasks]) as (adapted, elsewhere),
        Track("export", len(config.tasks), "tasks") as track,
    ):
        base = served_base(base_config, _sha256(adapted), adapter, run.folder.exports)
        for task in config.tasks:
            shown = split if manifest.samples_of(task.name, split) else "train"
            sample = next(iter(read_split(config.manifest_path, shown, task=task.name, cache=config.cache)))
            batch = encoder.collate(encoder.encode([sample]))
            asked = ExportedTask.of(task, base_config, base, encoder.label_tokens(task.name))
            folder, further = run.folder.export(task.name), {TASK_FILE: asked.text}
            if adapted.task_heads is not None:
                folders[task.name] = export_task(adapted, task.name, folder, batch, base_config, base, further)
            else:
                input_ids, attention_mask, *_ = batch.padded()
                inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
                folders[task.name] = adapted.export_task(task.name, folder, inputs, base, further, elsewhere)
            track.advance()
    if notice := serving_notice(write_serving(run.folder.exports, list(folders), base)):
        say(notice)
    return folders


def _sha256(adapted: Any) -> str | None:
    found = adapted.base_fingerprint()
    return None if found is None else found["sha256"]


def standing(run: Run) -> dict[str, Path]:
    """Return the exported folders, by task.

    Raises:
        InputError: one is missing.
    """
    folders = {task.name: run.folder.export(task.name) for task in run.config.tasks}
    for folder in folders.values():
        run.folder.needs(folder / "adapter_config.json", "export")
    return folders
