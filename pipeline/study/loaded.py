"""The frozen base of many runs, which a process loads once."""

from __future__ import annotations

import functools
import gc

from torch import nn

from pipeline.modeling.base_model import load_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.training.engine import device


def loaded_base(config: BaseModelConfig) -> nn.Module:
    """Return a base, loaded at the first call; a caller must not change it."""
    return _loaded(config.model_dump_json())


@functools.lru_cache(maxsize=2)
def _loaded(config: str) -> nn.Module:
    base = load_base(BaseModelConfig.model_validate_json(config), device())
    # Each run ends with a collection; libraries and base stay to the end, and passing over them takes a second a run.
    gc.collect()
    gc.freeze()
    return base
