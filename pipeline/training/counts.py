"""The parameters of a model with its adapter, counted on the meta device: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.contracts import TaskSpec
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import classes_of_heads
from pipeline.modeling.architecture import text_settings
from pipeline.modeling.quantization import quantized_layers
from pipeline.training.memory import Counts


def count_model(base: nn.Module, adapter: AdapterConfig, tasks: Sequence[TaskSpec]) -> Counts:
    """Return the counts of a model under a fresh adapter.

    Args:
        base: on the meta device; it is changed by the adapter.
        adapter: its shape.
        tasks: that share it.

    Raises:
        InputError: the adapter does not fit the base.
    """
    sizes = [layer.weight.numel() for layer in quantized_layers(base).values()]
    total = sum(p.numel() for p in base.parameters())
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in base.modules())
    adapted = build_adapter(adapter, base, [task.name for task in tasks], classes_of_heads(base, tasks))
    settings = text_settings(base.config)
    inner = getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
    # What a layer of norm, attention and gated MLP saves for its backward.
    layer = 14 * settings.hidden_size + 5 * inner
    return Counts(
        linear=sum(sizes),
        plain=total - sum(sizes),
        trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        largest=largest,
        largest_linear=max(sizes, default=0),
        token=settings.num_hidden_layers * layer,
        token_checkpointed=settings.num_hidden_layers * settings.hidden_size + layer,
    )
