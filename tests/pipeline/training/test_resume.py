"""A run that is stopped and taken up again: the same bits on the same ranks, the same losses on other ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.ingestion import DataConfig, prepare
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.pipeline.training.ranks import text_tasks, tiny_base, tiny_encoder, write_text_records
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("resume_worker.py")
ELASTIC = [f"{stage}:float32" for stage in (0, 1, 2, 3)]
KINDS = [*ELASTIC, "0:bfloat16", "2:bfloat16", "3:bfloat16"]
BASES = {"words": (tiny_base, KINDS), "heads": (tiny_encoder, ELASTIC)}
"""Each kind of base, scored by label words or by a head a task, with the kinds of its runs."""
CASES = [(base, kind.replace(":", "-")) for base, (_, kinds) in BASES.items() for kind in kinds]
ON_OTHER_RANKS = [(base, kind.replace(":", "-")) for base in BASES for kind in ELASTIC]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``words`` and ``heads`` of runs named KIND-STAGE-DTYPE: whole, cut at step 2, and elastic over 2, 1 and 2
    ranks; and ``texts``, whose answers are written. All in three starts of processes, which take most of the time."""
    root = tmp_path_factory.mktemp("runs")
    two, one, again = list[object](), list[object](), list[object]()
    for base, (save_base, kinds) in BASES.items():
        data = DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=12, days=4))
        prepare(data, synthetic_ads_tasks(), root / base, seed=0)
        ground = ["--", root / base, root / base / "manifest.json", save_base(root / base / "base")]
        two += [*ground, *_named("whole", kinds, 4), *_named("cut", kinds, 2), *_named("cut", kinds, 4)]
        two += [*_named("elastic_whole", ELASTIC, 4), *_named("elastic", ELASTIC, 1)]
        one += [*ground, *_named("elastic", ELASTIC, 2)]
        again += [*ground, *_named("elastic", ELASTIC, 4)]
    texts = root / "texts"
    records = write_text_records(texts / "in", {"train": 24, "test": 6})
    prepare(DataConfig(source="records", root=str(records)), text_tasks(), texts, seed=0)
    (texts / "tasks.json").write_text(json.dumps([task.model_dump(mode="json") for task in text_tasks()]))
    ground = ["--", texts, texts / "manifest.json", tiny_base(texts / "base")]
    two += [*ground, "texts_whole:2:float32:4", "texts_cut:2:float32:2", "texts_cut:2:float32:4"]
    two += ["texts_elastic_whole:0:float32:4", "texts_elastic:0:float32:2"]
    one += [*ground, "texts_elastic:0:float32:4"]
    for arguments, ranks in ((two, 2), (one, 1), (again, 2)):
        run_ranks(WORKER, arguments, ranks, timeout_s=700)
    return root


def _named(name: str, kinds: list[str], stop: int) -> list[str]:
    return [f"{name}-{kind.replace(':', '-')}:{kind}:{stop}" for kind in kinds]


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_stopped_run_ends_with_the_bits_of_the_whole_one(runs: Path, base: str, kind: str) -> None:
    whole, cut = runs / base / f"whole-{kind}", runs / base / f"cut-{kind}"
    assert _losses(cut) == _losses(whole)
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors", "state.json"):
        ends = [run / "checkpoints" / "step-00000004" / name for run in (whole, cut)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name


@pytest.mark.parametrize(("base", "kind"), ON_OTHER_RANKS)
def test_run_over_two_one_and_two_ranks_has_the_losses_of_the_whole_one(runs: Path, base: str, kind: str) -> None:
    elastic, whole = _losses(runs / base / f"elastic-{kind}"), _losses(runs / base / f"elastic_whole-{kind}")
    assert elastic == pytest.approx(whole, abs=1e-4)


def test_written_answers_resume_bit_for_bit_and_weigh_alike_on_any_ranks(runs: Path) -> None:
    texts = runs / "texts"
    assert _losses(texts / "texts_cut") == _losses(texts / "texts_whole")
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors", "state.json"):
        ends = [texts / run / "checkpoints" / "step-00000004" / name for run in ("texts_whole", "texts_cut")]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name
    assert _losses(texts / "texts_elastic") == pytest.approx(_losses(texts / "texts_elastic_whole"), abs=1e-4)
    rows = [json.loads(line) for line in (texts / "texts_whole" / "history.jsonl").read_text().splitlines()]
    measured = [row["validation"] for row in rows if "validation" in row]
    assert len(measured) == 2
    assert all(0 < row[task.name] < 1 for row in measured for task in text_tasks() if task.is_written)
