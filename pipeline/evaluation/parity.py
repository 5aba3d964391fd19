"""Whether an exported task answers as the multi-task model does, with PEFT alone: asked before an alias moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import Sample
from pipeline.errors import HeldBack, InputError

TOLERANCE = 5e-3
"""Largest difference of a class's log-probability, both computed in float32: sure answers are compared as closely."""


def export_parity(
    adapter: Path, exports: Mapping[str, Path], samples: Sequence[Sample], tolerance: float = TOLERANCE
) -> dict[str, float]:
    """Score a holdout sample with every export and with the multi-task model, and compare.

    The exports are loaded by PEFT onto a fresh base; nothing of ``mtl_lora`` takes part in their scores.

    Args:
        adapter: the predictor's folder.
        exports: task → PEFT LoRA folder.
        samples: of the holdout, of any tasks; each exported task needs at least one.
        tolerance: largest difference of a class's log-probability.

    Returns:
        Task → largest difference found.

    Raises:
        HeldBack: a task differs by more than the tolerance.
        InputError: a task has no export, or no sample.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    spec = PredictorSpec.read(adapter / PREDICTOR_FILE)
    spec = spec.model_copy(update={"base": spec.base.model_copy(update={"dtype": "float32"})})
    by_task = {task.name: [s for s in samples if s.task == task.name] for task in spec.tasks}
    for name, part in by_task.items():
        if name not in exports or not (exports[name] / "adapter_config.json").is_file():
            raise InputError(
                f"task {name!r} must have an exported PEFT folder, got {exports.get(name)}; run export first"
            )
        if not part:
            raise InputError(
                f"task {name!r} must have a holdout sample to compare its export on, got none; add samples"
            )
    expected = _multi_task(adapter, spec, by_task)
    differences = {name: _largest(expected[name], _exported(exports[name], spec, by_task[name])) for name in by_task}
    apart = {name: gap for name, gap in differences.items() if not gap <= tolerance}
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        raise HeldBack(
            f"an exported task must answer as the multi-task model does within {tolerance:g}, {worst!r} differs by "
            f"{apart[worst]:.3g} on {len(by_task[worst])} samples; export it anew from the adapter that is promoted"
        )
    return differences


def _multi_task(adapter: Path, spec: Any, by_task: Mapping[str, list[Sample]]) -> dict[str, list[np.ndarray]]:
    from pipeline.modeling.adapter import load_adapter
    from pipeline.modeling.base_model import load_base

    scorer = _scorer(load_adapter(load_base(spec.base), adapter, [task.name for task in spec.tasks]), spec)
    return {name: scorer.probabilities(samples) for name, samples in by_task.items()}


def _exported(folder: Path, spec: Any, samples: list[Sample]) -> list[np.ndarray]:
    from peft import PeftModel

    from pipeline.modeling.base_model import load_base

    base: Any = load_base(spec.base)
    # The base itself, its layers now PEFT's: the scorer asks it like any Hugging Face model.
    return _scorer(PeftModel.from_pretrained(base, str(folder)).get_base_model(), spec).probabilities(samples)


def _scorer(model: Any, spec: Any) -> Any:
    from pipeline.modeling.base_model import load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.scoring import LabelScorer, Scorer

    return Scorer(LabelScorer(model), Encoder(load_tokenizer(spec.base), spec.tasks, spec.base.max_length))


def _largest(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(np.log(a + _TINY) - np.log(b + _TINY)).max()) for a, b in zip(expected, found, strict=True))


_TINY = 1e-30
