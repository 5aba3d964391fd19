"""What do answers of 8 tasks cost when one batch writes them, against the base's own and PEFT's adapter_names?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.benchmarks.inference_speed import CONTROL, PROMPT, VOCABULARY, models
from tests.benchmarks.rivals import RANK, TASK_NAMES, TASKS, smollm2_135m
from tests.benchmarks.timing import hardware, interleaved, milliseconds, ratio, row, threads, versions

ROUNDS, ROWS, NEW = 5, 8, 8


def _generate(model: nn.Module, prompts: torch.Tensor, **routing: Any) -> Callable[[], None]:
    """Return the writing of so many tokens a row, the kept keys and values of the prompt included."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    generate: Any = model.generate

    @torch.inference_mode()
    def run() -> None:
        found = generate(**inputs, **settings, **routing)
        if found.shape != (ROWS, PROMPT + NEW):
            raise ValueError(f"each row must be given {NEW} tokens, got {tuple(found.shape)}")

    return run


def run() -> dict[str, Any]:
    """Measure whole answers on one thread, as a scoring worker writes them."""
    candidates = models(smollm2_135m())
    del candidates["merged"]
    ids = torch.arange(ROWS) % TASKS
    routing: dict[str, dict[str, Any]] = {
        "mixed": {"task_ids": ids},
        "adapter_names": {"adapter_names": [TASK_NAMES[i] for i in ids]},
    }
    prompts = torch.randint(VOCABULARY, (ROWS, PROMPT))
    with threads(1):
        runs = {name: _generate(model, prompts, **routing.get(name, {})) for name, model in candidates.items()}
        seconds = interleaved(runs, ROUNDS, warm_up=1)
    where = f"{ROWS} answers of {NEW} tokens after {PROMPT}"
    noise, over_base = (ratio(seconds, name, "base") for name in (CONTROL, "mixed"))
    speedup = ratio(seconds, "adapter_names", "mixed")
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks generation_speed",
        "hardware": hardware(),
        "versions": versions("torch", "peft", "transformers"),
        "protocol": (
            f"SmolLM2-135M's shape with random fp32 weights that all candidates share, {TASKS} tasks or adapters "
            f"mixed, q, k, v, o with r = {RANK}, n = 3, each model's own generate, greedy, one thread; candidates take "
            f"turns in random order, {ROUNDS} rounds, medians of ratios a round"
        ),
        "rows": [
            row(f"{CONTROL}, {where}: time over the base", "1.00", noise, None, median_ms=milliseconds(seconds)),
            row(f"8 tasks mixed, {where}: time over the base", "<= 1.08", over_base, over_base <= 1.08),
            row(f"8 tasks mixed, {where}: tokens a second over adapter_names", ">= 1.5", speedup, speedup >= 1.5),
        ],
        "not_measured": "beams, half precision, accelerators, prompts of different lengths",
    }
