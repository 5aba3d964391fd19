"""Scorers whose base is split over processes: each holds its part, and a layer is gathered while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mtl_lora import AdapterModel
from pipeline.heap import returned_when_freed
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import gathered_layer_by_layer, join_process_group, partitioned_loading


@contextlib.contextmanager
def split_scorers(load: Callable[..., dict[str, Any]], num_ranks: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Load scorers on every rank, named by the rank variables; within it all ranks ask them alike.

    Args:
        load: returns scorers by name; ``asking`` is handed to :func:`pipeline.modeling.base_model.load_base`.
        num_ranks: that the base is split over.
        dtype: ``model.dtype`` of the base.
    """
    join_process_group()
    with (
        returned_when_freed(),
        partitioned_loading(TrainingConfig(num_workers=num_ranks, zero_stage=3), bfloat16=False),
    ):
        scorers = load(asking=gathered_layer_by_layer)
    models = {id(model): model for model in map(_model_of, scorers.values())}
    with contextlib.ExitStack() as gathering:
        for model in models.values():
            gathering.enter_context(gathered_layer_by_layer(model))
        yield scorers


def _model_of(scorer: Any) -> Any:
    """Return the model that a scorer asks, without the adapter around it."""
    model = scorer.model.adapted
    return model.base_model if isinstance(model, AdapterModel) else model
