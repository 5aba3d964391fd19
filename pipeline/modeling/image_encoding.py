"""Samples with an image: the base's own processor makes pixels of it and its place among the prompt's tokens.

The image stands where the task's template has the processor's own mark for one, else before the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.images import UnreadableImage, decoded, png_of
from pipeline.modeling.encoding import Encoder, Prompt
from pipeline.modeling.image_inputs import ImageInputs

_READERS = 4
"""Images of a batch that are decoded at once; Pillow and NumPy let other threads run meanwhile."""
_TEXT_SIDE = ("input_ids", "attention_mask", "labels")
"""What processors return beside an image's arguments."""
_QWEN_START, _QWEN_END = "<|vision_start|>", "<|vision_end|>"


class ImageTextEncoder(Encoder):
    """Tokenises samples of which some have an image, for an image-text model.

    Args:
        tokenizer: as for :class:`Encoder`.
        specs: as there.
        max_length: as there; an image's tokens count too.
        processor: of the base.

    Raises:
        InputError: as there.
    """

    def __init__(self, tokenizer: Any, specs: Sequence[TaskSpec], max_length: int, processor: Any) -> None:
        super().__init__(tokenizer, specs, max_length)
        self.processor = processor
        self.mark = _mark(processor)
        self.image_id = tokenizer.convert_tokens_to_ids(_token(processor))

    def _encoded(self, samples: Sequence[Sample]) -> tuple[list[TaskSpec], list[Prompt]]:
        specs = [self.spec_of(sample) for sample in samples]
        places = [i for i, spec in enumerate(specs) if spec.image_field is not None]
        texts = [i for i, spec in enumerate(specs) if spec.image_field is None]
        found: dict[int, Prompt] = dict(zip(texts, super()._encoded([samples[i] for i in texts])[1], strict=True))
        with ThreadPoolExecutor(min(_READERS, max(1, len(places)))) as pool:
            read = pool.map(lambda i: self._prompt(specs[i], samples[i], samples[i].fields), places)
            found.update(zip(places, read, strict=True))
        return specs, [found[i] for i in range(len(samples))]

    def _prompt(self, spec: TaskSpec, sample: Sample, fields: Mapping[str, str]) -> Prompt:
        if spec.image_field is None:
            return super()._prompt(spec, sample, fields)
        where = f"sample {sample.task}/{sample.key}"
        if sample.image is None:
            raise InputError(f"a sample of a task with image_field has an image, {where} has none; give its bytes")
        if any(self.mark in text or _token(self.processor) in text for text in fields.values()):
            raise InputError(f"a text must not hold the mark of an image, {self.mark!r}, {where} does; take it out")
        text = spec.template.format_map(fields)
        text = text if self.mark in text else self.mark + text
        try:
            made = self.processor(text=text, images=decoded(sample.image), return_tensors="pt")
        except UnreadableImage as reason:
            raise InputError(f"an image must be PNG, JPEG or WebP, in {where} {reason}; run prepare again") from None
        ids = self._open(made["input_ids"][0].tolist())
        return Prompt(tuple(ids), self._image(hashlib.blake2b(sample.image, digest_size=16).digest(), ids, made))

    def _image(self, digest: bytes, ids: list[int], made: Mapping[str, Tensor]) -> ImageInputs:
        others = {name: value for name, value in made.items() if name not in _TEXT_SIDE}
        of_tokens = [name for name, value in others.items() if value.shape == made["input_ids"].shape]
        tensors = {name: value for name, value in others.items() if name not in of_tokens}
        end = len(ids) - ids[::-1].index(self.image_id) if self.image_id in ids else len(ids)
        if not of_tokens:
            return ImageInputs(digest, tensors, end)
        kinds = tuple(others[of_tokens[0]][0].tolist()[: len(ids)])
        # Kinds that tell images apart are 0 for text. PaliGemma's tell the answer, 1, from the prompt, which is read
        # both ways: no part of it stays the same where another one changes.
        is_of_images = any(kinds)
        return ImageInputs(
            digest, tensors, end if is_of_images else len(ids), of_tokens[0], kinds, 0 if is_of_images else 1
        )


def is_prefix_model(processor: Any) -> bool:
    """Whether a model reads its prompts both ways, as PaliGemma does: its kinds of tokens tell the answer alone."""
    made = processor(
        text=_mark(processor) + "x", images=decoded(png_of(np.zeros((32, 32, 3), np.uint8))), return_tensors="pt"
    )
    names = [name for name in made if name not in _TEXT_SIDE and made[name].shape == made["input_ids"].shape]
    return any(not made[name].any() for name in names)


def _token(processor: Any) -> str:
    return str(processor.image_token)


def _mark(processor: Any) -> str:
    """Return what stands for an image in a text that a processor is given."""
    if (start := getattr(processor, "boi_token", None)) is not None:  # Gemma 3
        return str(start)
    token = _token(processor)
    return f"{_QWEN_START}{token}{_QWEN_END}" if _QWEN_START in processor.tokenizer.get_vocab() else token
