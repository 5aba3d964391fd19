"""How much sooner does training data stand ready where shards are adopted than where they are copied by ``prepare``?"""

import io
import json
import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from tests.benchmarks.timing import hardware, ratio, row, versions

SAMPLES, A_SHARD, IMAGE_BYTES, ROUNDS = 2000, 250, 100_000, 3
ADOPTED = TaskSpec(name="caption", template="{text}\nTrue:", label_words=(" no", " yes"), image_field="jpg")
COPIED = ADOPTED.model_copy(update={"image_field": "image"})


def write(root: Path, image_bytes: int) -> None:
    """Write the same samples as shards of ``wds.ShardWriter`` and as records with their ``images.zip``."""
    rng = random.Random(0)
    folder = root / "records" / "caption"
    folder.mkdir(parents=True)
    (root / "shards").mkdir()
    lines = io.StringIO()
    with (
        wds.ShardWriter(str(root / "shards" / "part-%06d.tar"), maxcount=A_SHARD, verbose=0, encoder=False) as shards,
        zipfile.ZipFile(folder / "images.zip", "w") as images,
    ):
        for number in range(SAMPLES):
            words = " ".join(f"{rng.choice(('red', 'sofa', 'in', 'a', 'park'))}{rng.randrange(999)}" for _ in range(20))
            record = {"id": f"k{number:06d}", "text": words, "label": number % 2}
            image = b"\xff\xd8\xff" + rng.randbytes(image_bytes) if image_bytes else b""
            sample: dict[str, Any] = {"__key__": record["id"], "json": json.dumps(record).encode()}
            if image:
                sample["jpg"] = image
                images.writestr(f"{number:06d}.jpg", image)
            shards.write(sample)
            lines.write(json.dumps(record | ({"image": f"{number:06d}.jpg"} if image else {})) + "\n")
    (folder / "train.jsonl").write_text(lines.getvalue())


def measure(image_bytes: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return how many times longer copying takes by wall and processor, and the best seconds of each."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root, image_bytes)
        bare = {} if image_bytes else {"image_field": None}
        files = {"caption": {"train": "part-*.tar"}}
        copied = DataConfig(source="records", root=str(root / "records"), samples_per_shard=A_SHARD)
        adopted = DataConfig(source="webdataset", root=str(root / "shards"), files=files)

        candidates = {"copied": (copied, COPIED), "adopted": (adopted, ADOPTED)}
        for number in range(ROUNDS + 1):
            for each, (config, task) in candidates.items():
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    starts = time.perf_counter(), time.process_time()
                    prepare(config, [task.model_copy(update=bare)], Path(folder), 0)
                    ends = time.perf_counter(), time.process_time()
                if number:  # the first is a warm-up
                    for clock, start, end in zip(("wall", "processor"), starts, ends, strict=True):
                        seconds.setdefault(f"{each}, {clock}", []).append(end - start)
    clocks = {clock: ratio(seconds, f"copied, {clock}", f"adopted, {clock}") for clock in ("wall", "processor")}
    return clocks, {each: round(min(values), 3) for each, values in seconds.items()}


def run() -> dict[str, Any]:
    """Time both in turns, with images and without."""
    before = hardware()
    images, images_s = measure(IMAGE_BYTES)
    texts, texts_s = measure(0)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks adoption",
        "hardware": before,
        "versions": versions("webdataset", "pydantic", "numpy"),
        "protocol": f"{SAMPLES} samples of 20 words and {IMAGE_BYTES} bytes of image, {A_SHARD} a shard, by one "
        "process on a local disk: from wds.ShardWriter's tars (KEY.json, KEY.jpg) and from JSONL with a stored "
        f"images.zip; median over {ROUNDS} rounds of copied over adopted, in turns, by the clock on the wall, since "
        "copying waits for the disk, and by processor time, which leaves that out",
        "best_s": {"text and image": images_s, "text alone": texts_s},
        "rows": [
            row(f"{what}: adopting over copying through prepare, by {clock} time", goal, value, met)
            for what, found in (("text and image", images), ("text alone", texts))
            for clock, value in found.items()
            for is_goal in [what == "text and image" and clock == "wall"]
            for goal, met in [(">= 5", value >= 5) if is_goal else ("reported", None)]
        ],
        "not_measured": "S3, where adoption reads each tar once and copying reads and writes; several processes",
    }
