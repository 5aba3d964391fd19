from __future__ import annotations

from typing import Any

import pytest

from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer
from tests.pipeline.modeling.tiny_image_text import FAMILIES, tiny_image_text_folder


@pytest.fixture(scope="session")
def small_base() -> BaseModelConfig:
    return BaseModelConfig(num_layers=2, dtype="float32", max_length=48)


@pytest.fixture(scope="session")
def tokenizer(small_base: BaseModelConfig) -> Any:
    return load_tokenizer(small_base)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModelConfig]:
    """A tiny base of each image-text family that is tried."""
    root = tmp_path_factory.mktemp("families")
    return {
        kind: BaseModelConfig(base=str(tiny_image_text_folder(root / kind, kind)), dtype="float32", max_length=160)
        for kind in FAMILIES
    }
