"""One task of the trained adapter merged into its base: an ordinary model of transformers, with its tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from jobs.run import Run
from pipeline.errors import InputError, did_you_mean
from pipeline.stream import load_manifest, read_split


def merge(run: Run, task: str, output: Path) -> Path:
    """Write a task as a model that transformers alone loads.

    An encoder becomes an ``AutoModelForSequenceClassification``, whose logits are compared with the multi-task model's
    first, a language model an ``AutoModelForCausalLM``, of which
    no more than a file is held at once.

    Args:
        run: whose task it is, trained.
        task: its name.
        output: new folder.

    Raises:
        InputError: the task is unknown, the run is not trained, the folder is there already, or no classifier of
            transformers can express the task's head.
    """
    from pipeline.modeling.architecture import is_encoder
    from pipeline.modeling.base_model import base_settings, save_text_side
    from pipeline.modeling.classifier import merge_task
    from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor, PredictorSpec
    from pipeline.serving.offloaded_base import offloaded_base

    names = [spec.name for spec in run.config.tasks]
    if task not in names:
        raise InputError(f"--task must be one of the run's, got {task!r}{did_you_mean(task, names)}")
    if output.exists():
        raise InputError(f"--output must be a new folder, {output} is there; name another")
    run.folder.needs(run.folder.adapter / PREDICTOR_FILE, "train")
    spec = PredictorSpec.read(run.folder.adapter / PREDICTOR_FILE)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        if is_encoder(base_settings(spec.base)):
            predictor = Predictor.load(run.folder.adapter, "cpu")
            encoder, split = predictor.scorer.encoder, run.config.evaluation.split
            manifest = load_manifest(run.config.manifest_path)[0]
            shown = split if manifest.samples_of(task, split) else "train"
            sample = next(iter(read_split(run.config.manifest_path, shown, task=task, cache=run.config.cache)))
            adapted: Any = predictor.scorer.model.adapted
            merge_task(adapted, task, staged, encoder.collate(encoder.encode([sample])), spec.base)
        else:
            with offloaded_base(spec.base) as base:
                base.save_merged(base.adapted(run.folder.adapter, [t.name for t in spec.tasks]), task, staged)
        save_text_side(spec.base, staged)
        staged.chmod(0o755)
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output
