"""Inside webdataset's own pipelines and loader, is the exact order as fast as a bare ``webdataset`` loop without one?

Both sides decode by webdataset's functions and batch by its filters; the bare loop reads the tars from front to back.
"""

import functools
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from pipeline.contracts import Sample, ShardManifest, TaskSpec
from pipeline.ingestion import DataConfig, prepare, publish
from pipeline.ingestion.shards import write_shard
from pipeline.storage import filesystem
from pipeline.stream import CacheConfig, MixedStream
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.world import World
from tests.benchmarks.timing import hardware, interleaved, ratio, row, versions
from tests.pipeline.s3_server import S3Server

ALONE, BATCH, ROUNDS = World(0, 1), 32, 7
IMAGES, PIXELS = 1200, 160
URL = "s3://shards/bench"
Times = dict[str, list[float]]


def write_images(folder: Path) -> None:
    """Write two shards of JPEG images of smooth noise, some 8 kB each."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(2):
        samples = []
        for index in range(IMAGES // 2):
            buffer = io.BytesIO()
            small = random.integers(0, 256, (PIXELS // 8, PIXELS // 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((PIXELS, PIXELS)).save(buffer, "JPEG", quality=90)
            fields = {"text": f"what is in image {index} of {number}"}
            samples.append(Sample(key=f"{number}-{index}", task="t", fields=fields, label=0, image=buffer.getvalue()))
        shards.append(write_shard(folder, "t", "train", number, samples))
    spec = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
    ShardManifest(tasks=(spec,), shards=tuple(shards), source_sha256="0").write(folder / "manifest.json")


def tars_of(folder: Path) -> list[str]:
    """Return the names of the shards of train."""
    return [shard.path for shard in ShardManifest.read(folder / "manifest.json").shards if shard.split == "train"]


def consume(items: Any) -> None:
    """Take all."""
    for _ in items:
        pass


def bare(urls: Sequence[str], *decoders: str) -> Any:
    """Return the loop without an order."""
    return wds.WebDataset(list(urls), shardshuffle=False, empty_check=False).decode(*decoders)


def staged(place: str | Path, *decoders: str, cache: CacheConfig | None = None) -> wds.DataPipeline:
    """Return the stream's epoch in a pipeline of webdataset's."""
    return wds.DataPipeline(MixedStream(place, 0, BATCH, cache=cache).stage(ALONE), wds.decode(*decoders))


def both(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = ROUNDS) -> Times:
    """Time both in turns by the clock on the wall: the stream reads ahead in a thread."""
    return interleaved({"bare": theirs, "stream": ours}, rounds, 1, time.perf_counter)


def through_loader(folder: Path, urls: list[str]) -> Times:
    """Time both through a loader with two workers, which each start anew."""
    batched = functools.partial(wds.batched, BATCH, collation_fn=None)

    def load(pipeline: Any) -> None:
        consume(wds.WebLoader(pipeline, num_workers=2, batch_size=None, multiprocessing_context="fork"))

    return both(lambda: load(staged(folder).compose(batched())), lambda: load(bare(urls).compose(batched())))


def from_s3(folder: Path) -> Times:
    """Time both from a server on this machine: an empty cache each time against ``curl``, as webdataset reads URLs."""
    publish(folder, URL)
    fs, _ = filesystem(URL)
    urls = [f"pipe:curl -s -f '{fs.sign(f'{URL}/{name}')}'" for name in tars_of(folder)]

    def cold() -> None:
        with tempfile.TemporaryDirectory() as cache:
            consume(staged(URL, cache=CacheConfig(folder=cache)))

    return both(cold, lambda: consume(bare(urls)))


def one_sample(folder: Path) -> dict[str, float]:
    """Return the µs that a sample takes: in the order by index, front to back, and in the order by walking its tar."""
    stream = MixedStream(folder, 0, BATCH)
    places = [place for step in range(8) for place in stream.places(step)]

    def walked() -> None:
        for shard, wanted in places[:32]:
            found = wds.tarfile_samples([{"url": str(folder / shard.path)}])
            next(sample for number, sample in enumerate(found) if number == wanted)

    urls = [{"url": str(folder / name)} for name in tars_of(folder)]
    seconds = both(lambda: [stream.members(step, ALONE) for step in range(8)], walked)
    front = both(lambda: None, lambda: consume(wds.tarfile_samples(iter(urls))))
    micro = {
        "by index, in the order": statistics.median(seconds["stream"]) / len(places),
        "by webdataset's tar functions, in the order (walking the shard)": statistics.median(seconds["bare"]) / 32,
        "by webdataset's tar functions, from front to back": statistics.median(front["bare"]) / stream.num_samples,
    }
    return {name: value * 1e6 for name, value in micro.items()}


def run() -> dict[str, Any]:
    """Measure text, images, S3 and the loader, and what one sample takes."""
    before = hardware()
    times: dict[str, Times] = {}
    with tempfile.TemporaryDirectory() as name:
        ads, images = Path(name) / "ads", Path(name) / "images"
        images.mkdir()
        prepare(DataConfig(synthetic=SyntheticAdsConfig(days=8, rows_per_day=800)), synthetic_ads_tasks(), ads, 0)
        write_images(images)
        texts, pictures = ([str(folder / tar) for tar in tars_of(folder)] for folder in (ads, images))
        samples = MixedStream(ads, 0, BATCH).num_samples
        times["text"] = both(lambda: consume(staged(ads)), lambda: consume(bare(texts)))
        times["images decoded"] = both(lambda: consume(staged(images, "rgb8")), lambda: consume(bare(pictures, "rgb8")))
        server = S3Server(Path(name) / "s3")
        server.start()
        try:
            os.environ.update(server.environment())
            times["text from S3, cold cache"] = from_s3(ads)
        finally:
            server.kill()
        times["text through wds.WebLoader with two workers"] = through_loader(ads, texts)
        micro = one_sample(ads)
    goals = dict(zip(times, (1.5, 1.0, 0.9, 1.0), strict=True))
    rows = []
    for what, found in times.items():
        value = ratio(found, "bare", "stream")
        rate = (IMAGES if "images" in what else samples) / statistics.median(found["stream"])
        measure = f"samples/s, {what}: over a bare webdataset loop"
        rows.append(row(measure, f">= {goals[what]}", value, value >= goals[what], samples_per_s=round(rate)))
    rows += [row(f"µs a sample {how}", "reported", value, None) for how, value in micro.items()]
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("webdataset", "torch", "pillow", "s3fs"),
        "protocol": f"{samples} samples of text, {IMAGES} JPEG images of {PIXELS} × {PIXELS}, {ROUNDS} rounds in turns",
        "rows": rows,
        "not_measured": "a server on another machine: here it takes of the same two cores",
    }
