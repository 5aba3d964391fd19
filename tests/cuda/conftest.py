"""The device that the cases run on: the GPU, and where there is none the CPU, on which they prove only themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

GPUS = torch.cuda.device_count()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the result speaks for."""
    if GPUS:
        names = sorted({torch.cuda.get_device_name(i) for i in range(GPUS)})
        said = f"run on {GPUS} GPU(s): {', '.join(names)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    else:
        said = "no GPU here: the cases ran on the CPU and say nothing of CUDA, NCCL or speed on a GPU"
    terminalreporter.write_sep("=", said)


@pytest.fixture(scope="session")
def where() -> torch.device:
    """The device."""
    return torch.device("cuda" if GPUS else "cpu")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 in float32: TF32 has three decimal places."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
