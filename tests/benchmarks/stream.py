"""Does the deterministic mixed stream cost anything over a bare ``webdataset`` loop, and does training wait for it?"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from pipeline.contracts import ShardManifest
from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer, resolve_base
from pipeline.modeling.encoding import Encoder
from pipeline.stream import LengthGrouping, MixedStream
from pipeline.stream.grouping import padding_share
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.world import World
from tests.benchmarks.timing import hardware, interleaved, ratio, row, versions

ALONE = World(0, 1)
ROUNDS, STEPS_WITH_MODEL, STEPS_PADDED = 7, 6, 128
SUITE = Path(os.environ.get("MTL_LORA_ADS_SUITE", Path(__file__).resolve().parents[3] / "shared" / "data" / "ads"))


def reading(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the row of the reading rate, and both rates."""
    manifest = ShardManifest.read(folder / "manifest.json")
    tars = [str(folder / shard.path) for shard in manifest.shards if shard.split == "train"]

    def bare() -> None:
        for _ in wds.WebDataset(tars, shardshuffle=False).decode():
            pass

    def mixed() -> None:
        stream = MixedStream(folder, 0, 32)
        for _ in stream.batches(ALONE, 0, stream.steps_per_epoch):
            pass

    seconds = interleaved({"bare": bare, "mixed": mixed}, rounds=ROUNDS, warm_up=1)
    samples = MixedStream(folder, 0, 32).num_samples
    value = ratio(seconds, "bare", "mixed")
    rates = {name: round(samples / statistics.median(values)) for name, values in seconds.items()}
    measure = "samples/s through MixedStream, decoded, 1 process: over a bare webdataset loop"
    return row(measure, ">= 1.0", value, value >= 1.0), rates


def waiting(folder: Path) -> dict[str, Any]:
    """Return the row of the share of training steps that is spent waiting for samples."""
    config = BaseModelConfig()
    model = load_base(config)
    parameters = [p.requires_grad_() for n, p in model.named_parameters() if n.endswith("q_proj.weight")]
    encoder = Encoder(load_tokenizer(config), ShardManifest.read(folder / "manifest.json").tasks, config.max_length)
    batches = MixedStream(folder, 0, 16).batches(ALONE, 0, STEPS_WITH_MODEL + 1)
    next(batches)  # the first one finds nothing read ahead
    waited = 0.0
    start = time.perf_counter()
    for _ in range(STEPS_WITH_MODEL):
        before = time.perf_counter()
        samples = next(batches)
        waited += time.perf_counter() - before
        batch = encoder.collate(encoder.encode(samples))
        input_ids, attention_mask, *_ = batch.padded()
        states = model(input_ids=input_ids, attention_mask=attention_mask).logits
        states.float().logsumexp(-1).mean().backward()
        for parameter in parameters:
            parameter.grad = None
    share = waited / (time.perf_counter() - start)
    measure = "share of a training step spent waiting for data, SmolLM2-135M, batch 16"
    return row(measure, "<= 0.01", share, share <= 0.01)


def padding(root: Path) -> list[dict[str, Any]]:
    """Return the rows of the padding on the ads suite, in tokens of SmolLM2, for two batch shapes."""
    if not SUITE.is_dir():
        return [
            {"measure": f"padding on the ads suite: not there ({SUITE})", "goal": "<= 0.1", "value": None, "met": None}
        ]
    from jobs.config import load_config

    run_config = load_config(Path("jobs/configs/ads_real.yaml"), [f"data.root={SUITE}"])
    base = BaseModelConfig()
    tokenizer = resolve_base(base) / "tokenizer.json"
    data = run_config.data.model_copy(update={"max_samples": {}, "length_tokenizer": str(tokenizer)})
    manifest = prepare(data, run_config.tasks, root / "suite", 0)
    encoder = Encoder(load_tokenizer(base), manifest.tasks, base.max_length)
    rows = []
    for batch, ranks, micro in ((16, 2, 8), (64, 2, 16)):
        shares = {}
        for name, grouping in (("plain", None), ("grouped", LengthGrouping())):
            stream = MixedStream(root / "suite", 0, batch, length_grouping=grouping)
            slices = []
            for step in range(STEPS_PADDED):
                for rank in range(ranks):
                    examples = encoder.encode(stream.samples(step, World(rank, ranks)))
                    slices.append(sorted(len(example.prompt) for example in examples))
            shares[name] = padding_share(slices, micro)
        measure = f"padding on the ads suite, batch {batch}, {ranks} ranks, micro-batch {micro}"
        rows.append(row(measure, "<= 0.1", shares["grouped"], shares["grouped"] <= 0.1, ungrouped=shares["plain"]))
    return rows


def run() -> dict[str, Any]:
    """Measure reading, waiting and padding."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        synthetic = SyntheticAdsConfig(days=8, rows_per_day=500)
        prepare(DataConfig(synthetic=synthetic), synthetic_ads_tasks(), root / "ads", 0)
        rate_row, rates = reading(root / "ads")
        null = row("samples/s of a null model that only consumes, 1 process", "reported", rates["mixed"], None)
        rows = [rate_row, waiting(root / "ads"), null, *padding(root)]
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("webdataset", "torch", "transformers", "pydantic"),
        "samples_per_s": rates,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "not_measured": "shards on a network; images; more than one reading process",
    }
