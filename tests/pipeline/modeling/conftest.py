from __future__ import annotations

from typing import Any

import pytest

from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer


@pytest.fixture(scope="session")
def small_base() -> BaseModelConfig:
    return BaseModelConfig(num_layers=2, dtype="float32", max_length=48)


@pytest.fixture(scope="session")
def tokenizer(small_base: BaseModelConfig) -> Any:
    return load_tokenizer(small_base)
