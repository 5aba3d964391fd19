"""A training step on one GPU: ours over PEFT's LoRA and over the frozen base alone, its memory and its utilisation.

``python -m tests.cuda.speed`` prints the table as JSON; where there is no GPU it tries a small layout on the CPU, whose
figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mtl_lora import MTLLoRAConfig, MTLLoRAModel
from tests.benchmarks.timing import hardware, versions

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "A10G": 70e12}
"""Dense bfloat16 products a second, by a part of the card's name, from the makers' data sheets (SXM where there are
two)."""
TASKS, TARGETS = 8, ("q_proj", "k_proj", "v_proj", "o_proj")
LAYOUTS: dict[str, tuple[dict[str, int], int, int]] = {
    "tiny": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}, 4, 32),
    "135M": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 49152},
        32,
        256,
    ),
    "1B": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        16,
        512,
    ),
    "8B": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        8,
        512,
    ),
}
"""Shape, rows and tokens a row of a batch."""
ROUNDS, WARM_UP = 10, 3


def base(shape: dict[str, int], where: torch.device) -> nn.Module:
    """Return a model of random weights in bfloat16, made where it stays."""
    torch.manual_seed(0)
    with where:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def steps(name: str, shape: dict[str, int], batch: dict[str, Any], where: torch.device) -> Callable[[], None]:
    """Return one training step of a way, or of the frozen base alone: its forward, and its backward to what enters."""
    model = base(shape, where)
    if name == "frozen":
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]

        def alone() -> None:
            model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()
            embedded.grad = None

        return alone
    further: dict[str, Any] = {}
    if name == "ours":
        config = MTLLoRAConfig(task_names=[f"task{i}" for i in range(TASKS)], target_modules=TARGETS)
        model = MTLLoRAModel(model, config).to(where)
        further = {"task_ids": torch.arange(len(batch["input_ids"]), device=where) % TASKS}
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules=list(TARGETS)))  # type: ignore[arg-type]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train() -> None:
        model(**batch, **further).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def measured(step: Callable[[], None], where: torch.device) -> dict[str, float]:
    """Return the median seconds of a step and the most memory in GiB that the device held."""
    on_gpu = where.type == "cuda"
    seconds = []
    for number in range(WARM_UP + ROUNDS):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"seconds": statistics.median(seconds), "gib": round(peak, 2)}


def row(layout: str, where: torch.device) -> dict[str, Any]:
    """Measure a layout's ways one after another."""
    shape, rows, tokens = LAYOUTS[layout]
    ids = torch.randint(shape.get("vocab_size", 32000), (rows, tokens), device=where)
    batch = {"input_ids": ids, "labels": ids}
    found = {}
    for name in ("frozen", "peft", "ours"):
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[name] = measured(steps(name, shape, batch, where), where)
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    weights = sum(p.numel() for n, p in body.named_parameters() if "embed_tokens" not in n)
    name = torch.cuda.get_device_name() if where.type == "cuda" else "CPU"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    done = 4 * weights * rows * tokens  # forward and the gradient of what enters; frozen weights have none of their own
    ours = found["ours"]["seconds"]
    return {
        "layout": layout,
        "batch": [rows, tokens],
        "measured": found,
        "tokens_per_s": round(rows * tokens / ours),
        "step_over_peft": round(ours / found["peft"]["seconds"], 3),
        "step_over_frozen": round(ours / found["frozen"]["seconds"], 3),
        "utilisation": round(done / ours / peak, 3) if peak else None,
    }


def main() -> None:
    """Print the table."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [n for n in LAYOUTS if n != "tiny"] if where.type == "cuda" else ["tiny"]
    rows = [row(name, where) for name in names]
    card = torch.cuda.get_device_name() if where.type == "cuda" else None
    table = {"question": __doc__, "card": card, "hardware": hardware(), "versions": versions("torch", "peft")}
    print(json.dumps(table | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
