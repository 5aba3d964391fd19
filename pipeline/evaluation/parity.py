"""Whether an exported task answers as the multi-task model does, with PEFT alone: asked before an alias moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora import MTLLoRAError
from mtl_lora.hashes import check_hashes
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import HeldBack, InputError
from pipeline.evaluation.text_parity import greedily, largest_gap, tokens_by
from pipeline.json_text import parse_json

TOLERANCE = 5e-3
"""Largest difference of a class's log-probability, both computed in float32: sure answers are compared as closely."""


def export_parity(
    adapter: Path, exports: Mapping[str, Path], samples: Sequence[Sample], tolerance: float = TOLERANCE
) -> dict[str, float]:
    """Score a holdout sample with every export and with the multi-task model, and compare.

    The exports are loaded by PEFT onto a fresh base and scored by its own forward, as anyone who serves them would:
    nothing of ``mtl_lora``, of packed rows or of the scorer takes part in their scores.

    Args:
        adapter: the predictor's folder.
        exports: task → PEFT LoRA folder.
        samples: of the holdout, of any tasks; each exported task needs at least one.
        tolerance: largest difference of a class's log-probability; where answers are written, the tokens must be the
            same, or as likely as one another within it where they part.

    Returns:
        Task → largest difference found.

    Raises:
        HeldBack: a task differs by more than the tolerance, or its export is damaged.
        InputError: a task has no export, or no sample.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    spec = PredictorSpec.read(adapter / PREDICTOR_FILE)
    spec = spec.model_copy(
        update={
            "base": spec.base.model_copy(update={"dtype": "float32"}),
            "tasks": tuple(map(greedily, spec.tasks)),
        }
    )
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
    for name in by_task:
        try:
            check_hashes(exports[name])
        except MTLLoRAError as error:
            raise HeldBack(f"an exported task must be as it was written, {name!r} is not: {error}") from error
    expected = _multi_task(adapter, spec, by_task)
    tasks = {task.name: task for task in spec.tasks}
    differences = {
        name: _gap_of_texts(exports[name], spec, part, expected[name])
        if tasks[name].is_written
        else _largest(tasks[name], expected[name], _exported(exports[name], spec, part))
        for name, part in by_task.items()
    }
    apart = {name: gap for name, gap in differences.items() if not gap <= tolerance}
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        raise HeldBack(
            f"an exported task must answer as the multi-task model does within {tolerance:g}, {worst!r} differs by "
            f"{apart[worst]:.3g} on {len(by_task[worst])} samples; export it anew from the adapter that is promoted"
        )
    return differences


def _exported(folder: Path, spec: Any, samples: Sequence[Sample]) -> list[np.ndarray]:
    from pipeline.modeling.architecture import is_encoder
    from pipeline.modeling.base_model import base_settings
    from pipeline.modeling.classifier import ExportedHead
    from pipeline.modeling.head_encoding import head_classes
    from pipeline.modeling.predictor import default_device

    spec = spec.model_copy(update={"base": spec.base.model_copy(update={"packed_rows": False})})
    if is_encoder(base_settings(spec.base)):
        encoder = _encoder(spec)
        examples = encoder.encode(samples)
        labels = head_classes(spec.tasks)[examples[0].task]
        exported = ExportedHead(folder, spec.base, labels, default_device())
        return [exported.probabilities(example).cpu().numpy() for example in examples]
    return own_probabilities(exported_model(folder, spec), _encoder(spec), samples)


def _gap_of_texts(folder: Path, spec: Any, samples: Sequence[Sample], expected: Sequence[Any]) -> float:
    from pipeline.modeling.scoring import LabelScorer

    spec = spec.model_copy(update={"base": spec.base.model_copy(update={"packed_rows": False})})
    model, encoder = exported_model(folder, spec), _encoder(spec)
    return largest_gap(model, encoder, samples, expected, tokens_by(LabelScorer(model), encoder, samples))


def own_probabilities(model: Any, encoder: Any, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return class probabilities by their definition: each label word's log-likelihood in the model's own logits.

    Args:
        model: a Hugging Face causal language model or image-text model, its layers adapted or not.
        encoder: a :class:`pipeline.modeling.encoding.Encoder`.
        samples: of tasks that the encoder knows.
    """
    import torch

    from pipeline.modeling.image_inputs import row_arguments

    answers = []
    for example in encoder.encode(samples):
        found: list[torch.Tensor] = []
        longest = len(example.prompt) + max(map(len, example.words))
        at_once = 1 if example.image else max(1, _TOKENS // longest)
        for first in range(0, len(example.words), at_once):
            words = example.words[first : first + at_once]
            rows = [torch.tensor([*example.prompt, *word], device=model.device) for word in words]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            inputs = {"input_ids": padded, "attention_mask": mask}
            if example.image:
                inputs = row_arguments(model, example.prompt, example.image, words[0])
            with torch.inference_mode():
                log_p = model(**inputs).logits.float().log_softmax(-1)
            for row, word in enumerate(words):
                ends = torch.arange(len(word), device=model.device) + len(example.prompt) - 1
                each = log_p[row, ends, rows[row][-len(word) :]]
                found.append(each.mean() if example.length_normalized else each.sum())
        answers.append(torch.stack(found).double().softmax(0).cpu().numpy())
    return answers


_OF_ENCODERS = ("SEQ_CLS", "FEATURE_EXTRACTION")
_TOKENS = 1024
"""Most tokens of which the logits over the whole vocabulary are held at once."""


def exported_scorer(folder: Path, spec: Any, batch_tokens: int = 2048) -> Any:
    """Return a scorer of an exported task: PEFT's adapter on a fresh base, on CUDA where there is one.

    Args:
        folder: of the exported task.
        spec: a :class:`pipeline.modeling.predictor.PredictorSpec` with its base and its task.
        batch_tokens: see :class:`pipeline.modeling.scoring.Scorer`.

    Raises:
        InputError: as in :func:`exported_model`.
    """
    if _is_of_encoder(folder):
        from pipeline.modeling.classifier import ExportedHeadScorer

        return ExportedHeadScorer(_exported_head(folder, spec), _encoder(spec))
    return _scorer(exported_model(folder, spec), spec, batch_tokens)


def _is_of_encoder(folder: Path) -> bool:
    return parse_json((folder / "adapter_config.json").read_text()).get("task_type") in _OF_ENCODERS


def _exported_head(folder: Path, spec: Any) -> Any:
    """Return an exported task of an encoder; ``spec`` holds that task alone.

    Raises:
        InputError: a file is damaged, or the adapter does not fit the base.
    """
    from pipeline.modeling.architecture import is_encoder
    from pipeline.modeling.base_model import base_settings
    from pipeline.modeling.classifier import ExportedHead
    from pipeline.modeling.head_encoding import head_classes
    from pipeline.modeling.predictor import default_device

    if not is_encoder(base_settings(spec.base)):
        raise InputError(
            f"the exported adapter {folder} is of an encoder, got the base {spec.base.base!r}; name its own"
        )
    try:
        check_hashes(folder)
        return ExportedHead(folder, spec.base, head_classes(spec.tasks)[0], default_device())
    except (MTLLoRAError, RuntimeError, ValueError) as error:
        raise InputError(f"the exported adapter {folder} must fit the base {spec.base.base!r}: {error}") from error


def exported_model(folder: Path, spec: Any) -> Any:
    """Return the base model with an exported task's adapter, put there by PEFT.

    Args:
        folder: of the exported task.
        spec: a :class:`pipeline.modeling.predictor.PredictorSpec` with its base.

    Raises:
        InputError: a file is damaged, or the adapter does not fit the base: PEFT itself only warns, and leaves
            layers as they were.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from pipeline.modeling.base_model import load_base
    from pipeline.modeling.predictor import default_device

    try:
        check_hashes(folder)
    except MTLLoRAError as error:
        raise InputError(f"the exported adapter {folder} is damaged: {error}") from error
    if _is_of_encoder(folder):
        raise InputError(
            f"the exported adapter {folder} is of an encoder, got the base {spec.base.base!r}; name its own"
        )
    base: Any = load_base(spec.base, default_device())
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the exported adapter {folder} must fit the base {spec.base.base!r}: {error}") from error
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        given = {name for name in file.keys() if ".lora_" in name}  # noqa: SIM118 - not a mapping
    # Asked for embeddings too, PEFT would look for the base's name on the Hub.
    placed = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if ".lora_" in name}
    if given != placed:
        raise InputError(
            f"the exported adapter {folder} must fit the base {spec.base.base!r} with {spec.base.num_layers or 'all'} "
            f"layers, got {len(given - placed)} tensors without a place and {len(placed - given)} places without a "
            "tensor; name the base and model.num_layers that it was trained on"
        )
    # The base itself, its layers now PEFT's, is asked like any Hugging Face model.
    return model.get_base_model().eval()


def _multi_task(adapter: Path, spec: Any, by_task: Mapping[str, list[Sample]]) -> dict[str, Any]:
    """Return of each task the multi-task model's probabilities, or the tokens that it writes."""
    from pipeline.modeling.adapter import load_adapter
    from pipeline.modeling.base_model import load_base
    from pipeline.modeling.predictor import default_device

    base = load_base(spec.base, default_device())
    scorer = _scorer(load_adapter(base, adapter, [task.name for task in spec.tasks]), spec)
    written = {task.name for task in spec.tasks if task.is_written}
    return {
        name: tokens_by(scorer.model, scorer.encoder, samples) if name in written else scorer.probabilities(samples)
        for name, samples in by_task.items()
    }


def _scorer(model: Any, spec: Any, batch_tokens: int = 2048) -> Any:
    from pipeline.modeling.answering import class_scorer
    from pipeline.modeling.scoring import Scorer

    return Scorer(class_scorer(model), _encoder(spec), batch_tokens)


def _encoder(spec: Any) -> Any:
    from pipeline.modeling.answering import sample_encoder

    return sample_encoder(spec.base, spec.tasks)


def _largest(task: TaskSpec, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the largest difference of a log-probability; of a regression task's numbers, on its head's scale."""
    if task.kind == "regression":
        low, high = task.label_values
        return max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)) / ((high - low) / 2)
    return max(float(np.abs(np.log(a + _TINY) - np.log(b + _TINY)).max()) for a, b in zip(expected, found, strict=True))


_TINY = 1e-30
