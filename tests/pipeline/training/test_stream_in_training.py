"""Two real ranks that train on a loss-driven mixture: cut between two updates and on shards in S3, the same ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.ingestion import DataConfig, prepare, publish
from pipeline.stream import merge_ledgers
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.pipeline.s3_server import S3Server
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, EVERY, CUT = 8, 3, 4
WORKER = """
import json, os, sys
from pathlib import Path

from pipeline.synthetic import synthetic_ads_tasks
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.stream import CacheConfig, SampleLedger
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World

folder, manifest = Path(sys.argv[1]), sys.argv[2]
steps, every, cut = map(int, sys.argv[3:])
world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


class Callbacks:
    def started(self, step, num_steps):
        self.ledger = SampleLedger(folder, world, step)

    def stops(self):
        return False

    def log(self, row):
        pass

    def trained_on(self, step, rank, samples):
        self.ledger.record(step, samples)
        if cut and step == cut + 1:
            os._exit(0)


trainer = Trainer(
    TrainingJob(
        manifest_path=manifest,
        tasks=synthetic_ads_tasks(),
        base=BaseModelConfig(num_layers=1, dtype="float32"),
        adapter=AdapterConfig(r=4),
        training=TrainingConfig(
            num_workers=2, global_batch_size=16, micro_batch_size=8, max_steps=steps, checkpoint_steps=4,
            learning_rate=3e-2, ledger=True,
        ),
        seed=3,
        mixture={"kind": "loss_driven", "every_steps": every, "alpha": 3, "block_samples": 16},
        cache=CacheConfig(folder=str(folder / "cache"), patience_s=30),
    ),
    world,
    Callbacks(),
    folder / "checkpoints",
)
trainer.run()
(folder / f"updates-{world.rank}.json").write_text(json.dumps(trainer.stream.state_dict()["updates"]))
"""


def _train(folder: Path, manifest: str | Path, cut: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    run_ranks(folder / "worker.py", [folder, manifest, STEPS, EVERY, cut], 2)


def test_a_cut_run_on_s3_has_the_ledger_of_a_whole_one_on_local_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    synthetic = SyntheticAdsConfig(rows_per_day=12, days=4)
    prepare(DataConfig(synthetic=synthetic, samples_per_shard=10), synthetic_ads_tasks(), shards, seed=0)
    _train(tmp_path / "local", shards)
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        url = publish(shards, "s3://shards/training")
        _train(tmp_path / "remote", url, cut=CUT)  # a checkpoint at step 4, updates at 3 and 6
        assert not (tmp_path / "remote" / "updates-0.json").exists()
        _train(tmp_path / "remote", url)
    finally:
        server.kill()
    ledgers = [merge_ledgers(tmp_path / name).read_text() for name in ("local", "remote")]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0].splitlines()) == STEPS * 16
    updates = [
        json.loads((tmp_path / name / f"updates-{rank}.json").read_text())
        for name in ("local", "remote")
        for rank in (0, 1)
    ]
    assert all(found == updates[0] for found in updates)
    assert [update["step"] for update in updates[0]] == [3, 6]
    assert list((tmp_path / "remote" / "cache").glob("*.tar"))
    shares = [json.loads(line)["task"] for line in ledgers[0].splitlines()]
    first, last = shares[: EVERY * 16], shares[2 * EVERY * 16 :]
    assert {t: first.count(t) / len(first) for t in set(first)} != {t: last.count(t) / len(last) for t in set(first)}
