"""Does a SmolLM2-135M train faster, and in no more memory, than with PEFT's LoRA of the same rank?"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora import MTLLoRAModel
from tests.benchmarks.rivals import RANK, TASKS, copy_of, mtl_config, paper_model, peft_model, smollm2_135m
from tests.benchmarks.timing import hardware, interleaved, milliseconds, ratio, row, threads, versions

ROUNDS = 20
BATCH, SEQUENCE = 8, 32
IDS = torch.arange(BATCH) % TASKS


def _trained(model: nn.Module, tokens: Tensor, **routing: Any) -> Callable[[], None]:
    """Return one training step: forward to the answer position, loss, backward, fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    labels = torch.arange(len(tokens))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens, logits_to_keep=1, use_cache=False, **routing).logits
        F.cross_entropy(logits[:, -1].float(), labels).backward()
        optimizer.step()

    return step


def _frozen(base: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Return the base's forward and backward to the first layer's input: what no adapter can go below."""
    base.train()
    labels = torch.arange(len(tokens))

    def step() -> None:
        embedded = base.get_input_embeddings()(tokens).requires_grad_()
        logits = base(inputs_embeds=embedded, logits_to_keep=1, use_cache=False).logits
        F.cross_entropy(logits[:, -1].float(), labels).backward()

    return step


def steps(base: nn.Module, dropout: float, also: str | None = None) -> dict[str, Callable[[], None]]:
    """Return a step of this library, of PEFT and of one more candidate, all on the same frozen weights."""
    tokens = torch.randint(49152, (BATCH, SEQUENCE))
    candidates = {
        "peft_lora": _trained(peft_model(copy_of(base), dropout), tokens),
        "mtl_lora": _trained(MTLLoRAModel(copy_of(base), mtl_config(dropout)), tokens, task_ids=IDS),
    }
    if also == "paper":
        candidates["paper"] = _trained(paper_model(copy_of(base), SimpleNamespace(ids=IDS), dropout), tokens)
    elif also == "base":
        candidates["base"] = _frozen(copy_of(base), tokens)
    return candidates


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the most bytes that a step holds above what was held before it, from the allocator's own events."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(base: nn.Module, count: int, dropout: float, also: str | None = None) -> list[dict[str, Any]]:
    """Return the rows for one setting: time, and on one thread the peak memory too."""
    candidates = steps(base, dropout, also)
    with threads(count):
        seconds = interleaved(candidates, ROUNDS, warm_up=1)
    value = ratio(seconds, "mtl_lora", "peft_lora")
    measure = f"training step, dropout {dropout}, {count} thread(s): over PEFT LoRA"
    others = {f"over_{also}": round(ratio(seconds, "mtl_lora", also), 4)} if also else {}
    rows = [row(measure, "<= 0.97", value, value <= 0.97, median_ms=milliseconds(seconds), **others)]
    if count == 1:
        peaks = {name: peak_bytes(candidates[name]) for name in ("peft_lora", "mtl_lora")}
        share = peaks["mtl_lora"] / peaks["peft_lora"]
        mebibytes = {name: round(size / 2**20, 1) for name, size in peaks.items()}
        what = f"peak memory of that step, dropout {dropout}: over PEFT LoRA"
        rows.append(row(what, "<= 1.00", share, round(share, 4) <= 1.0, peak_mib=mebibytes))
    return rows


def run() -> dict[str, Any]:
    """Measure training steps and their memory."""
    base, everything = smollm2_135m(), torch.get_num_threads()
    rows = measure(base, 1, 0.05) + measure(base, 1, 0.0)
    rows += measure(base, everything, 0.05, "paper") + measure(base, everything, 0.0, "base")
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks model_speed",
        "hardware": hardware(),
        "versions": versions("torch", "peft", "transformers"),
        "protocol": (
            f"SmolLM2-135M's shape with random fp32 weights that all candidates share, batch {BATCH} x {SEQUENCE} "
            f"tokens, {TASKS} tasks mixed, q, k, v, o with r = {RANK}, n = 3, fused AdamW; turns in random order, "
            f"{ROUNDS} rounds, medians of ratios a round; base: frozen weights alone, forward and backward to the "
            "first layer's input"
        ),
        "rows": rows,
        "not_measured": "half precision, accelerators, padding",
    }
