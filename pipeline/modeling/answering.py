"""How a base model answers, chosen once by its kind: a language model by label words, an encoder by a head a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mtl_lora import AdapterModel
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.architecture import is_encoder, is_image_text
from pipeline.modeling.base_model import base_settings, has_processor, load_processor, load_tokenizer
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.encoding import Encoder, SampleEncoder
from pipeline.modeling.head_encoding import HeadEncoder, head_classes
from pipeline.modeling.head_scoring import HeadScorer, UntrainedHeadScorer
from pipeline.modeling.image_encoding import ImageTextEncoder, is_prefix_model
from pipeline.modeling.scoring import ClassScorer, LabelScorer, UntrainedScorer

__all__ = ["check_base", "class_scorer", "classes_of_heads", "sample_encoder", "untrained_scorer"]


def sample_encoder(config: BaseModelConfig, specs: Sequence[TaskSpec]) -> SampleEncoder:
    """Return what makes samples of these tasks tokens of a base model.

    Raises:
        InputError: the base cannot be read, or a task cannot be asked of it.
    """
    settings, tokenizer = base_settings(config), load_tokenizer(config)
    shown = [spec.name for spec in specs if spec.image_field is not None]
    if shown and not (is_image_text(settings) and has_processor(config)):
        raise InputError(
            f"a task with image_field needs an image-text model with its processor as model.base, {config.base!r} "
            f"({settings.model_type}) is none, got the task {shown[0]!r}; take another base, or remove image_field"
        )
    texts = [spec.name for spec in specs if spec.image_field is None]
    if texts and is_image_text(settings) and has_processor(config) and is_prefix_model(load_processor(config)):
        raise InputError(
            f"a task without image_field needs a model that reads text in one direction, {config.base!r} "
            f"({settings.model_type}) reads prompts both ways, got the task {texts[0]!r}; train it on another base"
        )
    if shown:
        return ImageTextEncoder(tokenizer, specs, config.max_length, load_processor(config))
    kind = HeadEncoder if is_encoder(settings) else Encoder
    return kind(tokenizer, specs, config.max_length)


def check_base(config: BaseModelConfig, tasks: Sequence[TaskSpec]) -> None:
    """Refuse, before a worker starts, a base model that cannot serve tasks: by its files but not its weights.

    Args:
        config: names the base model.
        tasks: whose label words must be told apart by its tokens.

    Raises:
        InputError: the folder holds no usable model, ``num_layers`` or ``max_length`` is more than it has, its
            tokenizer has tokens that its embedding has not, or a task's label words do not fit.
    """
    sample_encoder(config, tasks)


def class_scorer(adapted: nn.Module) -> ClassScorer:
    """Return what scores the classes of samples by a model under its adapter."""
    return HeadScorer(adapted) if is_encoder(_model(adapted).config) else LabelScorer(adapted)


def untrained_scorer(model: nn.Module, specs: Sequence[TaskSpec]) -> ClassScorer:
    """Return what scores by the base model alone: an encoder by fresh heads, always the same ones.

    Args:
        model: the base, or the base under an adapter, which is then switched off.
        specs: the tasks.
    """
    if is_encoder(_model(model).config):
        return UntrainedHeadScorer(model, head_classes(specs))
    return UntrainedScorer(model)


def classes_of_heads(base: nn.Module, specs: Sequence[TaskSpec]) -> tuple[int, ...]:
    """Return the rows of each task's head on a base model; none where it answers by words."""
    return head_classes(specs) if is_encoder(base.config) else ()


def _model(adapted: nn.Module) -> Any:
    return adapted.base_model if isinstance(adapted, AdapterModel) else adapted
