"""Ranks on devices: every ZeRO stage trains, is cut off and goes on, over NCCL where there are GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.ingestion import DataConfig, prepare
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.cuda.conftest import GPUS
from tests.pipeline.training.ranks import tiny_base
from tests.processes import run_ranks

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]

WORKER = Path(__file__).parents[1] / "pipeline" / "training" / "resume_worker.py"
KINDS = [f"{stage}:{dtype}" for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module", params=[1, 2])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs named whole-STAGE-DTYPE and cut-STAGE-DTYPE, over one rank or two."""
    ranks, folder = request.param, tmp_path_factory.mktemp("runs")
    if GPUS and ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, there is {GPUS}")
    prepare(DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=12, days=4)), synthetic_ads_tasks(), folder, seed=0)
    asked = [
        f"{name}-{kind.replace(':', '-')}:{kind}:{stop}"
        for name, stop in (("whole", 4), ("cut", 2), ("cut", 4))
        for kind in KINDS
    ]
    common = [folder, folder / "manifest.json", tiny_base(folder / "base")]
    run_ranks(WORKER, [*common, *asked], ranks, timeout_s=600, accelerator="cuda" if GPUS else "cpu")
    return folder


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [kind.replace(":", "-") for kind in KINDS])
def test_a_run_that_was_cut_off_ends_with_the_bits_of_the_whole_one(runs: Path, kind: str) -> None:
    assert _losses(runs / f"cut-{kind}") == _losses(runs / f"whole-{kind}")
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors"):
        whole, cut = (runs / f"{run}-{kind}" / "checkpoints" / "step-00000004" / name for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_stages_have_the_losses_of_the_first(runs: Path, dtype: str) -> None:
    first = torch.tensor(_losses(runs / f"whole-0-{dtype}"))
    for stage in (1, 2, 3):
        found = torch.tensor(_losses(runs / f"whole-{stage}-{dtype}"))
        torch.testing.assert_close(found, first, rtol=0, atol=1e-5 if dtype == "float32" else 2e-2)
