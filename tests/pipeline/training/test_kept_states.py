"""Runs whose states below the adapter are kept: to the last bit those that compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.ingestion import DataConfig, prepare
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.pipeline.training.ranks import tiny_base, tiny_encoder
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("kept_worker.py")
CASES = [("llama", 1), ("llama", 3), ("bert", 1), ("minilm", 1)]
OTHER_BUDGET = {"micro_batch_tokens": 400}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs NAME-BASE-STAGE over two ranks, two epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=3, days=4)), synthetic_ads_tasks(), folder, seed=0)
    bases = {
        "llama": (str(tiny_base(folder / "llama", layers=3)), [2]),
        "bert": (str(tiny_encoder(folder / "bert", layers=3)), [1, 2]),
        "minilm": ("minilm-l6", [4, 5]),
    }
    every: list[dict[str, Any]] = []
    for kind, stage in CASES:
        base, layers = bases[kind]

        def run(name: str, kept: dict[str, Any] | None = None, stop: int | None = None, **training: Any) -> None:
            settings = {"zero_stage": stage, **training, **({"kept_states": kept} if kept else {})}  # noqa: B023
            told = {"name": f"{name}-{kind}-{stage}", "base": base, "layers": layers}  # noqa: B023
            every.append({**told, "training": settings, "stop": stop})

        states = {"folder": str(folder / f"states-{kind}-{stage}")}
        run("computed")
        run("kept", states, stop=5)  # in the middle of the first epoch, to be resumed
        run("kept", states)
        if kind != "llama":
            continue
        run("again", states)
        run("small", {"folder": str(folder / f"small-{kind}-{stage}"), "max_bytes": 60_000})
        run("computed_otherwise", **OTHER_BUDGET)
        run("kept_otherwise", states, **OTHER_BUDGET)
    run_ranks(WORKER, [folder, folder / "manifest.json", json.dumps(every)], 2)
    return folder


def _told(run: Path) -> tuple[list[float], bytes]:
    losses = [json.loads(line)["loss"] for line in (run / "history.jsonl").read_text().splitlines()]
    last = max((run / "checkpoints").glob("step-*"))
    return losses, (last / "adapter" / "adapter_model.safetensors").read_bytes()


def _kept(run: Path) -> dict[str, int]:
    return json.loads((run / "kept-0.json").read_text())


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_a_run_with_kept_states_resumed_on_the_way_has_the_bits_of_one_that_computes(
    runs: Path, kind: str, stage: int
) -> None:
    assert _told(runs / f"kept-{kind}-{stage}") == _told(runs / f"computed-{kind}-{stage}")
    assert _kept(runs / f"kept-{kind}-{stage}")["read"]


@pytest.mark.parametrize(("kind", "stage"), [case for case in CASES if case[0] == "llama"])
def test_further_runs_read_what_was_kept_and_small_caches_let_go(runs: Path, kind: str, stage: int) -> None:
    computed = _told(runs / f"computed-{kind}-{stage}")
    assert _told(runs / f"again-{kind}-{stage}") == _told(runs / f"small-{kind}-{stage}") == computed
    assert _kept(runs / f"again-{kind}-{stage}")["missed"] == 0
    assert _kept(runs / f"small-{kind}-{stage}")["missed"] > _kept(runs / f"kept-{kind}-{stage}")["missed"]
    held = [p.stat().st_size for p in (runs / f"small-{kind}-{stage}").glob("*/*") if p.suffix in (".states", ".index")]
    assert 0 < sum(held) <= 60_000


@pytest.mark.parametrize(("kind", "stage"), [case for case in CASES if case[0] == "llama"])
def test_states_kept_under_one_packing_serve_another(runs: Path, kind: str, stage: int) -> None:
    assert _told(runs / f"kept_otherwise-{kind}-{stage}") == _told(runs / f"computed_otherwise-{kind}-{stage}")
    assert _kept(runs / f"kept_otherwise-{kind}-{stage}")["missed"] == 0
