"""Exporting and merging a task of a model with random weights, the memory of each apart.

``python -m tests.benchmarks.large_files FOLDER``: a line ``RESULT {...}`` tells bytes and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from tests.memory import Peak, anonymous_bytes
from tests.pipeline.modeling.tiny import tiny_tokenizer
from tests.pipeline.training.layouts import layout_folder

LAYOUT = "llama-3.1-8b"
TASKS = ["clicks", "relevance"]
_FILE_BYTES = 1 << 30


def scaled_layout(root: Path) -> Path:
    """Write a model of Llama-3.1-8B's proportions and a sixteenth of its size, with a tokenizer; return its folder."""
    shape = {"hidden_size": 1536, "intermediate_size": 5376, "num_hidden_layers": 16, "num_attention_heads": 12}
    heads = {"num_key_value_heads": 3, "vocab_size": 20480, "max_position_embeddings": 8192}
    folder = layout_folder(root, LAYOUT, **shape, **heads)
    write_random(folder)
    return folder


def write_random(folder: Path) -> int:
    """Write the weights of a folder's ``config.json``, bf16, file by file; return the bytes of all."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from pipeline.modeling.base_model import BaseModelConfig, empty_base

    tiny_tokenizer().save_pretrained(folder)
    state = empty_base(BaseModelConfig(base=str(folder), dtype="bfloat16"), layout_only=True).state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=_FILE_BYTES
    )
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for file, names in split.filename_to_tensors.items():
        tensors = {name: noise.repeat(-(-state[name].numel() // len(noise)))[: state[name].numel()] for name in names}
        shaped = {name: tensor.view(state[name].shape) for name, tensor in tensors.items()}
        shaped |= {name: torch.ones_like(t) for name, t in shaped.items() if t.dim() == 1}
        save_file(shaped, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def main(root: Path) -> None:
    """Write the model and an adapter, export and merge a task, and tell."""
    from pipeline.modeling.adapter import AdapterConfig, build_adapter
    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.serving.offloaded_base import adapter_to_export, offloaded_base

    folder = layout_folder(root, LAYOUT, max_position_embeddings=8192)
    whole = write_random(folder)
    config = BaseModelConfig(base=str(folder), dtype="bfloat16")
    with offloaded_base(config) as base:
        adapted = build_adapter(AdapterConfig(), base.model, TASKS)
        torch.manual_seed(0)
        values = {name: 0.02 * torch.randn(t.shape) for name, t in adapted.adapter_state_dict().items()}
        adapted.load_adapter_state_dict(values)
        adapted.base_fingerprint(base)
        adapted.save_pretrained(root / "adapter")
        del adapted, values
    peak, floor, found, start = Peak(), anonymous_bytes(), {"whole": whole}, time.monotonic()
    with adapter_to_export(config, root / "adapter", TASKS) as (model, elsewhere):
        inputs = {"input_ids": torch.arange(5, 69)[None]}
        model.export_task("clicks", root / "exported", inputs, elsewhere=elsewhere)
    found |= {"export": peak.take(), "export_s": round(time.monotonic() - start, 1)}
    start = time.monotonic()
    with offloaded_base(config) as base:
        base.save_merged(base.adapted(root / "adapter", TASKS), "clicks", root / "merged")
    found |= {"merge": peak.take(), "merge_s": round(time.monotonic() - start, 1), "floor": floor}
    found["merged_bytes"] = sum(path.stat().st_size for path in (root / "merged").glob("*.safetensors"))
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
