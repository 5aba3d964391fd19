"""Proof, when an image-text model is loaded, that samples with images are scored as its own forward does.

As in :mod:`pipeline.modeling.probe`, which has proven text before: the model is asked about a few pictures plainly, one
row at a time as its processor makes it, and as the scorer asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_lora import AdapterModel
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.images import png_of
from pipeline.modeling.architecture import short
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.image_encoding import ImageTextEncoder, is_prefix_model
from pipeline.modeling.image_features import ImageFeatures
from pipeline.modeling.image_inputs import row_arguments
from pipeline.modeling.image_parts import is_adapted_for_images
from pipeline.modeling.packed_attention import is_packed
from pipeline.modeling.packing import Batch, Example, pack
from pipeline.modeling.probe import agree, choose_rows
from pipeline.modeling.scoring import LabelScorer

_SIZES = ((64, 48), (48, 64), (64, 48))
"""Width and height of the pictures: two alike in shape, one not."""
_LONGEST = 1 << 20


@torch.no_grad()
def choose_image_rows(model: Any, config: BaseModelConfig, processor: Any) -> str | None:
    """Let a model take samples with images, and texts alone, in packed rows where its scores stay its own, else in
    padded ones.

    What was found of images stands in the model's attribute ``packs_images``.

    Args:
        model: a Hugging Face image-text model in evaluation mode.
        config: names it.
        processor: its own.

    Returns:
        Why rows of text are padded although packed ones were asked for; None where they are not.

    Raises:
        InputError: it does not answer, does not look at the picture, or its scores differ even with padded rows.
    """
    is_prefix = is_prefix_model(processor)
    reason_of_text = "it reads prompts both ways" if is_prefix else choose_rows(model, config)
    try:
        examples = _examples(processor, with_text=not is_prefix)
        own = [_own(model, example) for example in examples]
    except InputError:
        raise
    except Exception as error:  # each model that cannot fails in its own way
        raise _refused(model, config, short(error)) from error
    if agree(model, own[0], own[2]):
        raise _refused(model, config, "other pictures change nothing")
    batch = pack(examples).to(model.device)
    for packs in (True, False) if is_packed(model) else (False,):
        model.packs_images = packs
        reason = _objection(model, batch, own)
        if not reason:
            return reason_of_text
    raise _refused(model, config, f"its scores are not its own: {reason}")


def _examples(processor: Any, with_text: bool) -> list[Example]:
    """Return questions about pictures, two of them about one, with words of one and of two tokens, and a text alone."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in _SIZES]
    specs = [
        TaskSpec(name="seen", template="{text} a", label_words=(" b", " c"), image_field="image"),
        TaskSpec(name="read", template="{text} a", label_words=(" b", " c")),
    ]
    encoder = ImageTextEncoder(processor.tokenizer, specs, _LONGEST, processor)
    asked = [("seen", "x", 0), ("seen", "x", 1), ("seen", "x", 2), ("seen", "y z", 0)]
    asked += [("read", "x", 0)] if with_text else []
    samples = [
        Sample(key=str(i), task=task, fields={"text": text}, label=0, image=png_of(images[picture]))
        for i, (task, text, picture) in enumerate(asked)
    ]
    found: list[Example] = []
    for prompt, (task, _, _) in zip(encoder.prompts(samples), asked, strict=True):
        t = [i for i in prompt.ids if prompt.image is None or i != encoder.image_id][-1]
        words = ((t, t), (t,))
        found.append(
            Example(
                f"probe/{len(found)}", int(task == "read"), prompt.ids, words, (1.0, 0.0), False, image=prompt.image
            )
        )
    return found


def _own(model: Any, example: Example) -> Tensor:
    """Return the logits (2, V) at the end of a prompt and after the first token of its longer word."""
    longer = example.words[0][:-1]
    logits = model(**row_arguments(model, example.prompt, example.image, longer)).logits[0].float()
    return logits[len(example.prompt) - 1 :]


def _objection(model: Any, batch: Batch, own: Sequence[Tensor]) -> str:
    """Return why the scorer's logits are not the model's own; empty if they are."""
    try:
        found_PV, _ = LabelScorer(model).answer_logits(batch)
    except Exception as error:  # noqa: BLE001 - see choose_image_rows
        return short(error)
    width = batch.class_mask.shape[1]
    # Of each example the terms stand in the order of its words' tokens: the prompt's end, then what follows it.
    slots = (batch.term_slot // width).tolist()
    for e, own_2V in enumerate(own):
        places = batch.term_answer[[k for k, slot in enumerate(slots) if slot == e][:2]]
        if not agree(model, own_2V, found_PV[places]):
            return f"logits differ by up to {(own_2V - found_PV[places]).abs().max():.2g}"
    return ""


@torch.no_grad()
def find_image_features(adapted: AdapterModel, processor: Any) -> ImageFeatures | str:
    """Return what makes the features of images, each image alone, or why a model is not itself with them.

    Args:
        adapted: an image-text model as it will be trained, whole.
        processor: its own.
    """
    if is_adapted_for_images(adapted):
        return "what makes them is trained"
    model: Any = adapted.base_model
    batch = pack(_examples(processor, with_text=False)).to(model.device)
    training, scorer = adapted.training, LabelScorer(adapted)
    adapted.eval()
    try:
        found = ImageFeatures(model, batch.images[0])
        own_PV, _ = scorer.answer_logits(batch)
        scorer.features = found
        given_PV, _ = scorer.answer_logits(batch)
    except Exception as error:  # noqa: BLE001 - see choose_image_rows
        return short(error)
    finally:
        adapted.train(training)
    if not agree(model, own_PV, given_PV):
        return f"its logits are others with them, by up to {(own_PV - given_PV).abs().max():.2g}"
    return found


def _refused(model: Any, config: BaseModelConfig, reason: str) -> InputError:
    return InputError(
        f"model.base must answer about images as its own forward does, {config.base!r} ({model.config.model_type}) "
        f"does not: {reason}; take another image-text model"
    )
