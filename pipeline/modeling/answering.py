"""How a base model answers, chosen once by its kind: a language model by label words, an encoder by a head a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mtl_lora import AdapterModel
from pipeline.contracts import TaskSpec
from pipeline.modeling.architecture import is_encoder
from pipeline.modeling.base_model import base_settings, load_tokenizer
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.encoding import Encoder, SampleEncoder
from pipeline.modeling.head_encoding import HeadEncoder, head_classes
from pipeline.modeling.head_scoring import HeadScorer, UntrainedHeadScorer
from pipeline.modeling.scoring import ClassScorer, LabelScorer, UntrainedScorer

__all__ = ["check_base", "class_scorer", "classes_of_heads", "sample_encoder", "untrained_scorer"]


def sample_encoder(config: BaseModelConfig, specs: Sequence[TaskSpec]) -> SampleEncoder:
    """Return what makes samples of these tasks tokens of a base model.

    Raises:
        InputError: the base cannot be read, or a task cannot be asked of it.
    """
    kind = HeadEncoder if is_encoder(base_settings(config)) else Encoder
    return kind(load_tokenizer(config), specs, config.max_length)


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
