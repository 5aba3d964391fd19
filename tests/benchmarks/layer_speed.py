"""Is one adapted layer faster than PEFT's LoRA of the same rank, forward and backward, with 8 tasks mixed?"""

from typing import Any

import torch
from torch import nn

from tests.benchmarks.rivals import TASKS, layers
from tests.benchmarks.timing import hardware, interleaved, milliseconds, ratio, row, threads, versions

WIDTHS = (576, 1024, 2048, 4096)
BATCH = 16
GOAL = 0.95
ROUNDS = 20
TOKENS_A_ROW = {576: 64, 1024: 64, 2048: 64, 4096: 32}


def _step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Any:
    def run() -> None:
        layer(x).backward(grad)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    return run


def measure(width: int, dropout: float, count: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return one row: this library's time over PEFT LoRA's, and the other candidates' medians."""
    torch.manual_seed(0)
    sequence = TOKENS_A_ROW[width]
    ids = torch.arange(BATCH) % TASKS
    x = torch.randn(BATCH, sequence, width, requires_grad=True)
    grad = torch.randn(BATCH, sequence, width)
    with threads(count):
        seconds = interleaved({name: _step(m, x, grad) for name, m in layers(width, dropout, ids).items()}, rounds)
    value = ratio(seconds, "mtl_lora", "peft_lora")
    return row(
        f"layer {width}, {BATCH}x{sequence}, dropout {dropout}, {count} thread(s): over PEFT LoRA",
        f"<= {GOAL}",
        value,
        value <= GOAL,
        median_ms=milliseconds(seconds),
        over_paper=round(ratio(seconds, "mtl_lora", "paper"), 4),
        over_base=round(ratio(seconds, "mtl_lora", "base"), 4),
        peft_over_base=round(ratio(seconds, "peft_lora", "base"), 4),
    )


def run() -> dict[str, Any]:
    """Measure all widths, with and without dropout, on one thread and on all."""
    counts = sorted({1, torch.get_num_threads()})
    rows = [measure(width, p, count) for count in counts for p in (0.05, 0.0) for width in WIDTHS]
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks layer_speed",
        "hardware": hardware(),
        "versions": versions("torch", "peft"),
        "protocol": f"fp32, frozen weight, turns in random order, {ROUNDS} rounds, medians of ratios a round",
        "rows": rows,
        "not_measured": "half precision, accelerators",
    }
