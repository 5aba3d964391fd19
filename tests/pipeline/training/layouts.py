"""The shapes of known models, as their ``config.json`` has them: to be planned, not loaded."""

from __future__ import annotations

import json
from pathlib import Path

_COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
LAYOUTS = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072),
}
PARAMETERS = {"llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}
"""As their publishers' weights count."""


def layout_folder(root: Path, name: str, **changes: int) -> Path:
    """Write a folder with a model's ``config.json`` and nothing else; some of its sizes may be changed."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(zip(_NAMES, LAYOUTS[name], strict=True))
    (folder / "config.json").write_text(json.dumps(_COMMON | sizes | changes))
    return folder
