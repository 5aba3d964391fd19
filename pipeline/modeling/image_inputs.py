"""What a base's own processor makes of an image, and how the images of a batch go into the model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """One sample's image beside its prompt's tokens."""

    digest: bytes
    """Of the encoded image: equal digests, equal pixels."""
    tensors: Mapping[str, Tensor]
    """Arguments of the model's forward by name (``pixel_values`` …), the first axis this sample's images or patches."""
    end: int
    """Tokens of the prompt up to the last that depends on the image's place: what follows is text."""
    kind_name: str | None = None
    """Name under which the model is told each token's kind, where it wants to know."""
    kinds: tuple[int, ...] = ()
    """Kind of each of the prompt's tokens, such as 1 for those of the image."""
    later_kind: int = 0
    """Kind of an answer's tokens."""


def image_arguments(
    images: Sequence[ImageInputs], device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the arguments of a model's forward that hold some samples' images, in their order.

    Args:
        images: of the samples.
        device: of the model.
        dtype: of the model; None leaves the processor's.
    """
    if not images:
        return {}
    together = {name: _joined([image.tensors[name] for image in images]) for name in images[0].tensors}
    return {n: t.to(device, dtype if t.is_floating_point() else None, non_blocking=True) for n, t in together.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join along the first axis; where pictures are cut into more tiles than others, these get empty ones, which models
    leave out."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        most = [max(sizes) for sizes in zip(*shapes, strict=True)]
        parts = [F.pad(part, [n for have, want in zip(part.shape[:0:-1], most[::-1], strict=True)
                              for n in (0, want - have)]) for part in parts]  # fmt: skip
    return torch.cat(list(parts))


def row_arguments(
    model: Any, ids: Sequence[int], image: ImageInputs | None, answer: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Return the arguments with which anyone calls a model on one prompt and what was answered so far.

    Args:
        model: the Hugging Face model.
        ids: the prompt's tokens.
        image: beside it.
        answer: further tokens.
    """
    row = torch.tensor([[*ids, *answer]], device=model.device)
    found = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if image is None:
        return found
    if image.kind_name is not None:
        kinds = [*image.kinds, *[image.later_kind] * len(answer)]
        found[image.kind_name] = torch.tensor([kinds], device=model.device)
    return found | image_arguments([image], model.device, model.dtype)
