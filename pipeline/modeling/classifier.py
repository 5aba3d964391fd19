"""An encoder's tasks outside of this product: as classifiers of transformers, or as a LoRA with the head beside it.

A classifier of transformers expresses a head where it reads the first token through layers that can be made to do
nothing (:mod:`mtl_lora.classification`). Of other bases, and where states are the mean over tokens, the exported
folder is a PEFT LoRA of the encoder itself; ``head.safetensors`` beside it holds ``weight`` (C, H) and ``bias`` (C,).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mtl_lora import AdapterModel, MTLLoRAError
from mtl_lora.classification import CLASSIFIERS, export_classifier, merge_classifier
from mtl_lora.serving import ServedBase
from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.modeling.base_model import base_settings, load_base, resolve_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.packing import Batch, HeadExample
from pipeline.modeling.scoring import Reply

HEAD_FILE = "head.safetensors"


def plain_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Return a batch's rows as anyone gives them to a Hugging Face encoder: padded, with a mask."""
    nodes, mask = batch.padded_nodes()
    inputs = {"input_ids": batch.input_ids[nodes], "attention_mask": mask.long()}
    return inputs | ({"token_type_ids": batch.token_type[nodes]} if model.row_reading.has_segments else {})


def _classifier_class(settings: Any) -> Any:
    """Return the classifier of transformers for an encoder, None where it has none that can express a head."""
    from transformers import AutoModelForSequenceClassification

    try:
        found: Any = AutoModelForSequenceClassification._model_mapping[type(settings)]
    except KeyError:
        return None
    return found if found.__name__ in CLASSIFIERS else None


def _labelled(settings: Any, num_labels: int) -> Any:
    settings = copy.deepcopy(settings)
    settings.num_labels = num_labels
    return settings


def export_task(
    adapted: AdapterModel,
    task: str,
    folder: Path,
    batch: Batch,
    config: BaseModelConfig,
    base: ServedBase,
    further: Mapping[str, str],
) -> Path:
    """Write one task of an encoder as a PEFT folder: a classifier where one can express it, else with its head beside.

    Args:
        adapted: the encoder under its adapter, with heads.
        task: its name.
        folder: replaced as a whole once the new one is verified.
        batch: of samples, on which outputs are compared.
        config: of the base.
        base: how the base is called elsewhere.
        further: texts by file name that belong to the folder.

    Raises:
        InputError: the base cannot be read.
        ExportMismatchError: the folder does not reproduce the model.
    """
    heads, model, index = adapted.task_heads, adapted.base_model, adapted.task_id(task)
    if heads is None:
        raise InputError(f"task {task!r} must have a head to be exported with, got an adapter without; train it anew")
    settings, inputs = base_settings(config), plain_inputs(model, batch)
    kind = _classifier_class(settings)
    if kind is not None and config.pooling == "first":
        classifier = kind(_labelled(settings, heads.classes[index]))
        return export_classifier(adapted, task, folder, classifier, inputs, base_name=base.name, further_files=further)
    rows = heads.rows(index)
    head = save({"weight": heads.weight.detach()[rows].float().cpu(), "bias": heads.bias.detach()[rows].float().cpu()})
    return adapted.export_task(task, folder, inputs, base, {**further, HEAD_FILE: head})


def merge_task(adapted: AdapterModel, task: str, folder: Path, batch: Batch, config: BaseModelConfig) -> Path:
    """Write one task of an encoder, merged, as a model that ``AutoModelForSequenceClassification`` loads.

    Raises:
        InputError: no classifier of transformers can express its head.
    """
    settings = base_settings(config)
    kind = _classifier_class(settings)
    if kind is None:
        raise InputError(
            f"a merged task must be a classifier of transformers that can express its head, {settings.model_type!r} "
            f"has none; take a base of {sorted(CLASSIFIERS)}, or the exported LoRA with its head"
        )
    heads, index = adapted.task_heads, adapted.task_id(task)
    labels = heads.classes[index] if heads is not None else 1
    try:
        classifier = kind(_labelled(settings, labels))
        inputs = plain_inputs(adapted.base_model, batch)
        return merge_classifier(adapted, task, folder, classifier, inputs, pooling=config.pooling)
    except MTLLoRAError as error:
        raise InputError(str(error)) from error


class ExportedHead:
    """An exported task of an encoder as anyone loads it: PEFT on the base's files, and nothing of this product's own.

    Args:
        folder: of the export.
        config: of the base.
        labels: rows of the task's head.
        device: that computes.
    """

    def __init__(self, folder: Path, config: BaseModelConfig, labels: int, device: torch.device | str) -> None:
        from mtl_lora.verification import load_plain

        self.pooling, self.head = config.pooling, None
        if (folder / HEAD_FILE).is_file():
            self.head = {name: t.to(device) for name, t in load_file(folder / HEAD_FILE).items()}
            base: Any = load_base(config, device)
        else:
            settings = _labelled(base_settings(config), labels)
            kind = _classifier_class(settings)
            base = kind.from_pretrained(resolve_base(config), config=settings, dtype=torch.float32).to(device)
        self.model: Any = load_plain(base, folder)[0].eval()
        self.device, self.has_segments = device, (getattr(base.config, "type_vocab_size", None) or 0) > 1

    def probabilities(self, example: HeadExample) -> Tensor:
        """Return the class probabilities (C,) of a sample, or its number: each of its rows read alone."""
        return self.answer(example)[0]

    @torch.inference_mode()
    def answer(self, example: HeadExample) -> tuple[Tensor, Tensor]:
        """Return what :meth:`probabilities` does, and the state (H,) of the first row's first token, or its mean."""
        read = [self._read(row, types) for row, types in zip(example.rows, example.token_types, strict=True)]
        logits = [scores for scores, _ in read]
        scores = (logits[0] if len(logits) == 1 else torch.cat(logits)).double()
        if example.link == "identity":
            return example.scale[0] + scores * example.scale[1], read[0][1]
        return scores.sigmoid() if example.link == "sigmoid" else scores.softmax(0), read[0][1]

    def _read(self, row: tuple[int, ...], types: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": torch.tensor([row], device=self.device)}
        if self.has_segments:
            inputs["token_type_ids"] = torch.tensor([types], device=self.device)
        if self.head is None:
            found = self.model(**inputs, output_hidden_states=True)
            return found.logits[0].float(), found.hidden_states[-1][0, 0].float()
        states_SH = self.model(**inputs).last_hidden_state[0].float()
        state_H = states_SH[0] if self.pooling == "first" else states_SH.mean(0)
        return self.head["weight"] @ state_H + self.head["bias"], state_H


class ExportedHeadScorer:
    """Scores samples by an exported task of an encoder; see :class:`pipeline.modeling.scoring.Scorer`.

    Args:
        head: the export.
        encoder: tokenises for it.
    """

    def __init__(self, head: ExportedHead, encoder: SampleEncoder) -> None:
        self.head, self.encoder = head, encoder

    def probabilities(
        self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """Return each sample's class probabilities in label order, or its number, fp64."""
        return [probabilities for probabilities, _ in self.answers(samples, progress)]

    def answers(
        self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return what :meth:`probabilities` does, and the state (H,), fp32, of each sample's first row."""
        found = []
        for example in self.encoder.encode(samples):
            scores, state = self.head.answer(example)  # type: ignore[arg-type]  # of an encoder, whose rows have heads
            found.append((scores.cpu().numpy(), state.cpu().numpy()))
            if progress is not None:
                progress(1)
        return found

    def evaluated(self, samples: Sequence[Sample]) -> list[tuple[Reply, np.ndarray]]:
        """Return the reply to each sample with the state that :meth:`answers` gives."""
        return [(Reply(probabilities), state) for probabilities, state in self.answers(samples)]
