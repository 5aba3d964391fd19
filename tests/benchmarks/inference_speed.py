"""Does a batch of 8 tasks cost what the base costs, and how much more do PEFT's adapter_names cost?"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mtl_lora import MTLLoRAModel
from tests.benchmarks.rivals import (
    RANK,
    TASK_NAMES,
    TASKS,
    copy_of,
    lora_config,
    mtl_config,
    peft_model,
    smollm2_135m,
)
from tests.benchmarks.timing import hardware, interleaved, milliseconds, ratio, row, threads, versions

ROUNDS = 20
VOCABULARY = 49152
PROMPT = 32
CONTROL = "the base's own copy"


def _prefill(model: nn.Module, rows: int, sequence: int, **routing: Any) -> Callable[[], None]:
    """Return one forward over whole texts to their last position."""
    tokens = torch.randint(VOCABULARY, (rows, sequence))

    @torch.inference_mode()
    def run() -> None:
        model(tokens, logits_to_keep=1, use_cache=False, **routing)

    return run


def _decode(model: nn.Module, rows: int, **routing: Any) -> Callable[[], None]:
    """Return one step of decoding: a token a row after a prompt whose keys and values are kept."""
    with torch.inference_mode():
        prompt = torch.randint(VOCABULARY, (rows, PROMPT))
        kept = model(prompt, logits_to_keep=1, use_cache=True, **routing).past_key_values
    token = torch.randint(VOCABULARY, (rows, 1))

    @torch.inference_mode()
    def run() -> None:
        model(token, past_key_values=kept, use_cache=True, **routing)
        kept.crop(-1)

    return run


def models(base: nn.Module) -> dict[str, nn.Module]:
    """Return the candidates, all on the same frozen weights; the copy of the base shows the noise."""
    peft = peft_model(copy_of(base), 0.0)
    for name in TASK_NAMES:
        peft.add_adapter(name, lora_config(0.0))
    merged, mixed = (MTLLoRAModel(copy_of(base), mtl_config(0.0)) for _ in range(2))
    for path, layer in merged.adapted_layers().items():
        nn.init.normal_(layer.lora_B, std=0.02)
        mixed.base_model.get_submodule(path).lora_B.data.copy_(layer.lora_B)
    merged.merge(TASK_NAMES[0])
    candidates = {"base": base, CONTROL: copy_of(base), "merged": merged, "mixed": mixed, "adapter_names": peft}
    return {name: model.eval() for name, model in candidates.items()}


def measure(candidates: dict[str, nn.Module], count: int, rows: int, sequence: int | None) -> list[dict[str, Any]]:
    """Return the table's lines for one shape; ``sequence`` None is a step of decoding."""
    ids = torch.arange(rows) % TASKS
    routing: dict[str, dict[str, Any]] = {
        "merged": {"task_ids": 0},
        "mixed": {"task_ids": ids},
        "adapter_names": {"adapter_names": [TASK_NAMES[i] for i in ids]},
    }
    mixed: Any = candidates["mixed"]
    with ExitStack() as stack:
        stack.enter_context(threads(count))
        stack.enter_context(mixed.fixed_weights())
        runs = {}
        for name, model in candidates.items():
            options = routing.get(name, {})
            runs[name] = (
                _decode(model, rows, **options) if sequence is None else _prefill(model, rows, sequence, **options)
            )
        seconds = interleaved(runs, ROUNDS, warm_up=1)
    shape = f"decoding {rows}x1 after {PROMPT}" if sequence is None else f"prefill {rows}x{sequence}"
    where = f"{shape}, {count} thread(s)"
    noise, merged, over_base = (ratio(seconds, name, "base") for name in (CONTROL, "merged", "mixed"))
    speedup = ratio(seconds, "adapter_names", "mixed")
    return [
        row(f"{CONTROL}, {where}: over the base", "1.00", noise, None, median_ms=milliseconds(seconds)),
        row(f"merged, {where}: over the base", "1.00 ± 0.02", merged, abs(merged - 1) <= 0.02),
        row(f"8 tasks mixed, {where}: over the base", "<= 1.08", over_base, over_base <= 1.08),
        row(f"8 tasks mixed, {where}: adapter_names over ours", ">= 2.5", speedup, speedup >= 2.5),
    ]


def run() -> dict[str, Any]:
    """Measure whole texts and steps of decoding, few rows and many, on one thread and on all."""
    candidates, rows = models(smollm2_135m()), []
    for count in sorted({1, torch.get_num_threads()}):
        for number, sequence in ((8, None), (32, None), (8, 32)):
            rows += measure(candidates, count, number, sequence)
    rows += measure(candidates, torch.get_num_threads(), 16, 24)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks inference_speed",
        "hardware": hardware(),
        "versions": versions("torch", "peft", "transformers"),
        "protocol": (
            f"SmolLM2-135M's shape with random fp32 weights that all candidates share, {TASKS} tasks or adapters "
            f"mixed, q, k, v, o with r = {RANK}, n = 3, weights fixed as in serving; candidates take turns in random "
            f"order, {ROUNDS} rounds, medians of ratios a round"
        ),
        "rows": rows,
        "not_measured": "half precision, accelerators, padding",
    }
