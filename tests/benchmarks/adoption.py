"""How much sooner does training data stand ready where shards are adopted than where they are copied by ``prepare``?"""

import json
import random
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.tar_records import tar_records
from pipeline.validate import check_record
from tests.benchmarks.timing import hardware, ratio, row, versions
from tests.pipeline.made_images import image_bytes

IMAGES, TEXTS, A_SHARD, IMAGE_BYTES, ROUNDS = 6000, 40_000, 1000, 100_000, 3
HEAD = image_bytes("JPEG")
"""A whole image; what follows it in the file is read and digested, and not decoded."""
ADOPTED = TaskSpec(name="caption", template="{text}\nTrue:", label_words=(" no", " yes"), image_field="jpg")
COPIED = ADOPTED.model_copy(update={"image_field": "image"})
FILES = {"caption": {"train": "part-*.tar"}}


def write(root: Path, samples: int, image_bytes: int) -> None:
    """Write samples as shards of ``wds.ShardWriter``."""
    rng = random.Random(0)
    root.mkdir()
    with wds.ShardWriter(str(root / "part-%06d.tar"), maxcount=A_SHARD, verbose=0, encoder=False) as shards:
        for number in range(samples):
            words = " ".join(f"{rng.choice(('red', 'sofa', 'in', 'a', 'park'))}{rng.randrange(999)}" for _ in range(20))
            record = {"id": f"k{number:06d}", "text": words, "label": number % 2}
            sample: dict[str, Any] = {"__key__": record["id"], "json": json.dumps(record).encode()}
            if image_bytes:
                sample["jpg"] = HEAD + rng.randbytes(image_bytes)
            shards.write(sample)


def unpack(shards: Path, folder: Path) -> None:
    """Make records with their ``images.zip`` of shards, which is what ``prepare`` copies."""
    folder.mkdir(parents=True)
    urls = [str(path) for path in sorted(shards.iterdir())]
    with (folder / "train.jsonl").open("wb") as lines, zipfile.ZipFile(folder / "images.zip", "w") as images:
        for sample in wds.WebDataset(urls, shardshuffle=False):
            record = json.loads(sample["json"])
            if "jpg" in sample:
                record["image"] = f"{sample['__key__']}.jpg"
                images.writestr(record["image"], sample["jpg"])
            lines.write(json.dumps(record).encode() + b"\n")


def parse(shards: Path, task: TaskSpec) -> None:
    """Read, check and digest each sample: what no preparation can leave out."""
    fields = task.text_fields
    for path in sorted(shards.iterdir()):
        for record, _, _ in tar_records(str(path), {"text", "label", "id", "jpg"}):
            check_record(record, task, fields).digest(b"")


def measure(samples: int, image_bytes: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of each candidate in each round, by the clock on the wall and by processor time."""
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "shards", samples, image_bytes)
        unpack(root / "shards", root / "records" / "caption")
        bare = {} if image_bytes else {"image_field": None}
        task = ADOPTED.model_copy(update=bare)
        copied = DataConfig(source="records", root=str(root / "records"), samples_per_shard=A_SHARD)
        adopted = DataConfig(source="webdataset", root=str(root / "shards"), files=FILES)
        (root / "adopted").mkdir()
        last = max((root / "shards").iterdir())

        def add_one(_: Path) -> None:
            last.touch()  # a new version of one tar
            prepare(adopted, [task], root / "adopted", 0)

        candidates: dict[str, Callable[[Path], Any]] = {
            "unpacked": lambda folder: unpack(root / "shards", folder / "caption"),
            "copied": lambda folder: prepare(copied, [COPIED.model_copy(update=bare)], folder, 0),
            "adopted": lambda folder: prepare(adopted, [task], folder, 0),
            "one more": add_one,
            "parsed": lambda _: parse(root / "shards", task),
        }
        for number in range(ROUNDS + 1):
            for each, run_it in candidates.items():
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    starts = time.perf_counter(), time.process_time()
                    run_it(Path(folder))
                    ends = time.perf_counter(), time.process_time()
                if number:  # the first is a warm-up
                    wall.setdefault(each, []).append(ends[0] - starts[0])
                    processor.setdefault(each, []).append(ends[1] - starts[1])
    for seconds in (wall, processor):
        pairs = zip(seconds["unpacked"], seconds["copied"], strict=True)
        seconds["unpacked and copied"] = [one + two for one, two in pairs]
    return wall, processor


def rows_of(what: str, wall: dict[str, list[float]], processor: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the lines of one kind of data."""
    told, shards, floor = (ratio(wall, over, under) for over, under in (
        ("copied", "adopted"), ("unpacked and copied", "adopted"), ("copied", "parsed")))  # fmt: skip
    return [
        row(f"{what}: adopting over copying through prepare, of records that stand ready", ">= 5", told, told >= 5),
        row(f"{what}: adopting over copying the shards: unpacking them, then prepare", ">= 5", shards, shards >= 5),
        row(f"{what}: the first by processor time", "reported", ratio(processor, "copied", "adopted"), None),
        row(f"{what}: most that adopting can reach: copying over reading and checking", "reported", floor, None),
        row(f"{what}: a changed tar in an adopted set, over all", "reported", ratio(wall, "one more", "adopted"), None),
    ]


def run() -> dict[str, Any]:
    """Time all in turns, with images and without."""
    before = hardware()
    found = {"text and image": measure(IMAGES, IMAGE_BYTES), "text alone": measure(TEXTS, 0)}
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks adoption",
        "hardware": before,
        "versions": versions("webdataset", "pydantic", "numpy"),
        "protocol": f"{IMAGES} samples of 20 words and {IMAGE_BYTES} bytes of image, and {TEXTS} of 20 words alone, "
        f"{A_SHARD} a shard, by one process on a local disk: from wds.ShardWriter's tars (KEY.json, KEY.jpg), and from "
        f"JSONL with a stored images.zip that webdataset made of them; median over {ROUNDS} rounds, in turns, by the "
        "clock on the wall, since copying waits for the disk",
        "best_s": {
            f"{what}, {clock}": {name: round(min(values), 3) for name, values in seconds.items()}
            for what, clocks in found.items()
            for clock, seconds in zip(("wall", "processor"), clocks, strict=True)
        },
        "rows": [line for what, clocks in found.items() for line in rows_of(what, *clocks)],
        "not_measured": "S3, where adoption reads each tar once and copying reads and writes; several processes",
    }
