"""What stands below the language model of a sample with an image: the same features in every epoch, kept.

A vision tower and its connector that nothing trains make the same features of an image each time. Each image goes
through them alone, which takes longer, so that its features do not depend on its neighbours: those that are read are
those that would be computed, while images that go through the model together may differ from them in the last bits.
Transformers' own argument ``mm_encoder_outputs`` hands them to the model, which then runs neither part.

Axes: M an image's tokens, H hidden size of the language model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.modeling.image_inputs import ImageInputs, image_arguments
from pipeline.modeling.kept_states import KeptStates


class ImageFeatures:
    """The features of images, computed one image at a time, or read where they are kept.

    Args:
        model: a Hugging Face image-text model.
        example: any image, by which it is found how the model wants its features.

    Attributes:
        kept: where they are kept; None where each is computed anew.
    """

    def __init__(self, model: Any, example: ImageInputs) -> None:
        self.model = model
        self.kept: KeptStates | None = None
        with torch.no_grad():
            self._is_joined = isinstance(self._pooled(example), Tensor)

    def arguments(self, images: Sequence[ImageInputs]) -> dict[str, Any]:
        """Return the arguments of a model's forward that stand for some samples' images, in their order.

        Args:
            images: of the samples.
        """
        if not images:
            return {}
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        found: Any = [one.to(self.model.device, non_blocking=True) for one in self.features(images)]
        # A model takes a tensor or a sequence of images; either way it puts their rows in the places of their tokens.
        found = torch.cat(found) if self._is_joined else found
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=found)}}

    def features(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Return the features (M, H) of each image."""
        keys_of_images = [hashlib.sha256(image.digest).digest() for image in images]
        own = dict(zip(keys_of_images, images, strict=True))
        keys = list(own)
        read = self.kept.read(keys) if self.kept is not None else [None] * len(keys)
        missing = [key for key, states in zip(keys, read, strict=True) if states is None]
        fresh = [self.compute(own[key]) for key in missing]
        if self.kept is not None and fresh:
            fresh = self.kept.keep(missing, fresh)
        found = {key: states for key, states in zip(keys, read, strict=True) if states is not None}
        found |= dict(zip(missing, fresh, strict=True))
        return [found[key] for key in keys_of_images]

    @torch.no_grad()
    def compute(self, image: ImageInputs) -> Tensor:
        """Return an image's features (M, H)."""
        return torch.cat([part.flatten(0, -2) for part in self._pooled(image)])

    def _pooled(self, image: ImageInputs) -> Any:
        inputs = image_arguments([image], self.model.device, self.model.dtype)
        return self.model.get_image_features(**inputs, return_dict=True).pooler_output
