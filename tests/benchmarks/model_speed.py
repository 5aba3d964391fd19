"""Does a SmolLM2-135M train and answer faster, and in no more memory, than with PEFT's LoRA of the same rank?"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora import MTLLoRAModel
from tests.benchmarks.rivals import ALPHA, RANK, TASK_NAMES, TASKS, PaperLinear, mtl_config
from tests.benchmarks.timing import hardware, interleaved, milliseconds, ratio, row, threads, versions

ROUNDS = 20
BATCH, SEQUENCE = 8, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.arange(BATCH) % TASKS


class _Holder:
    ids = IDS


def smollm2_135m() -> nn.Module:
    """Return a model of SmolLM2-135M's shape with random weights: its speed does not depend on their values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _lora_config(dropout: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS)


def _peft(base: nn.Module, dropout: float) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(base, _lora_config(dropout))


def _paper(base: nn.Module, dropout: float) -> nn.Module:
    base.requires_grad_(False)
    for path, module in list(base.named_modules()):
        if path.rsplit(".", 1)[-1] in TARGETS:
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, PaperLinear(module, _Holder(), dropout))
    return base


def _trained(model: nn.Module, tokens: Tensor, **routing: Any) -> Callable[[], None]:
    """Return one training step: forward to the answer position, loss, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(len(tokens))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens, logits_to_keep=1, use_cache=False, **routing).logits
        F.cross_entropy(logits[:, -1].float(), labels).backward()
        optimizer.step()

    return step


def _steps(base: nn.Module, dropout: float, with_paper: bool = False) -> dict[str, Callable[[], None]]:
    tokens = torch.randint(49152, (BATCH, SEQUENCE))
    steps = {
        "peft_lora": _trained(_peft(copy.deepcopy(base), dropout), tokens),
        "mtl_lora": _trained(MTLLoRAModel(copy.deepcopy(base), mtl_config(dropout)), tokens, task_ids=IDS),
    }
    if with_paper:
        steps["paper"] = _trained(_paper(copy.deepcopy(base), dropout), tokens)
    return steps


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


def _training_rows(base: nn.Module) -> list[dict[str, Any]]:
    rows = []
    everything = torch.get_num_threads()
    for count, dropout in ((1, 0.05), (1, 0.0), (everything, 0.05)):
        steps = _steps(base, dropout, with_paper=count == everything)
        with threads(count):
            seconds = interleaved(steps, ROUNDS, warm_up=1)
        value = ratio(seconds, "mtl_lora", "peft_lora")
        measure = f"training step, dropout {dropout}, {count} thread(s): over PEFT LoRA"
        extra = {"over_paper": round(ratio(seconds, "mtl_lora", "paper"), 4)} if "paper" in seconds else {}
        rows.append(row(measure, "<= 0.97", value, value <= 0.97, median_ms=milliseconds(seconds), **extra))
        if count == 1:
            peaks = {name: peak_bytes(steps[name]) for name in ("peft_lora", "mtl_lora")}
            value = peaks["mtl_lora"] / peaks["peft_lora"]
            mebibytes = {name: round(value / 2**20, 1) for name, value in peaks.items()}
            measure = f"peak memory of that step, dropout {dropout}: over PEFT LoRA"
            rows.append(row(measure, "<= 1.00", value, round(value, 4) <= 1.0, peak_mib=mebibytes))
    return rows


def _answering(model: nn.Module, tokens: Tensor, **routing: Any) -> Callable[[], Tensor]:
    model.eval()

    @torch.inference_mode()
    def answer() -> Tensor:
        return model(tokens, logits_to_keep=1, use_cache=False, **routing).logits

    return answer


def _inference_rows(base: nn.Module, count: int) -> list[dict[str, Any]]:
    tokens = torch.randint(49152, (BATCH, SEQUENCE))
    peft = _peft(copy.deepcopy(base), 0.0)
    for name in TASK_NAMES:
        peft.add_adapter(name, _lora_config(0.0))
    merged = MTLLoRAModel(copy.deepcopy(base), mtl_config(0.0))
    merged.merge(TASK_NAMES[0])
    candidates = {
        "base": _answering(base, tokens),
        "merged": _answering(merged, tokens, task_ids=0),
        "mixed": _answering(MTLLoRAModel(copy.deepcopy(base), mtl_config(0.0)), tokens, task_ids=IDS),
        "peft_adapter_names": _answering(peft, tokens, adapter_names=[TASK_NAMES[i] for i in IDS]),
    }
    with threads(count):
        seconds = interleaved(candidates, ROUNDS)
    merged_ratio, mixed = ratio(seconds, "merged", "base"), ratio(seconds, "mixed", "base")
    speedup = ratio(seconds, "peft_adapter_names", "mixed")
    where = f"{count} thread(s)"
    return [
        row(f"merged inference, {where}: over the base", "1.00 ± 0.02", merged_ratio, abs(merged_ratio - 1) <= 0.02),
        row(f"8 tasks mixed, inference, {where}: over the base", "<= 1.08", mixed, mixed <= 1.08),
        row(
            f"8 tasks mixed, inference, {where}: PEFT adapter_names over ours",
            ">= 2.5",
            speedup,
            speedup >= 2.5,
            median_ms=milliseconds(seconds),
        ),
    ]


def run() -> dict[str, Any]:
    """Measure training steps, their memory, and inference."""
    base = smollm2_135m()
    rows = _training_rows(base)
    for count in sorted({1, torch.get_num_threads()}):
        rows += _inference_rows(base, count)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks model_speed",
        "hardware": hardware(),
        "versions": versions("torch", "peft", "transformers"),
        "protocol": (
            f"SmolLM2-135M's shape with random fp32 weights, batch {BATCH} x {SEQUENCE} tokens, {TASKS} tasks mixed, "
            f"q, k, v, o with r = {RANK}, n = 3; candidates take turns, {ROUNDS} rounds, medians of ratios a round"
        ),
        "rows": rows,
        "not_measured": "half precision, accelerators, padding",
    }
