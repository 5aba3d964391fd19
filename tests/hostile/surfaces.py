"""The doors: each makes a real input once, and gives the door a mutated one at each call.

A surface is a function of a folder that returns a :data:`tests.hostile.drive.Put`; everything it needs is made there.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.contracts import Comparison, EvaluationReport, Sample, ShardManifest, TaskSpec
from pipeline.record import Rejected
from tests.hostile.drive import Put
from tests.hostile.mutations import VALUES, as_json, mutated_bytes, mutated_value
from tests.pipeline.made_images import image_bytes

MORE = {"template": "{text}:", "group_field": "group", "weight_field": "weight"}
TASKS = (
    TaskSpec(name="binary", label_words=(" no", " yes"), **MORE),  # type: ignore[arg-type]
    TaskSpec(name="several", kind="multiclass", label_words=(" 1", " 2", " true"), **MORE),  # type: ignore[arg-type]
    TaskSpec(name="pick", kind="choice", label_field="label", **MORE),  # type: ignore[arg-type]
    TaskSpec(name="stars", kind="ordinal", label_words=(" 0", " 1"), label_values=(0, 1), **MORE),  # type: ignore[arg-type]
    TaskSpec(name="nested", template="{text}", label_words=(" a", " b"), columns={"text": "other.a.0"}),
    TaskSpec(name="shown", template="{text}", label_words=(" a", " b"), image_field="image"),
)
RECORD = {
    "text": 'a text, "quoted" and ünï\n',
    "label": 1,
    "choices": ["a", "b"],
    "group": "g",
    "weight": 1.5,
    "id": "row-1",
    "date": "2026-01-05",
    "task": "binary",
    "other": {"a": ["x", 2, None]},
    "image": "iVBORw0KGgo=",
}


def _look_at(location: Path, spec: TaskSpec, task: str = "*", **reading: Any) -> bool:
    """Read a file of records as preparing and scoring do; return whether a record is taken."""
    from pipeline.ingestion import DataConfig
    from pipeline.ingestion.records import Unit, read_unit, tell_dialects
    from pipeline.ingestion.source_file import SourceFile
    from pipeline.record import asked
    from pipeline.validate import check_record, day_of, key_of

    source = SourceFile(task, "train", str(location), location.name, size=location.stat().st_size)
    config = DataConfig(source="records", root=str(location.parent), **reading)
    tell_dialects(config, [source])
    taken = False
    columns = {*RECORD, "json", "txt", "cls", "png"} if source.is_tar else None
    for line in read_unit(Unit(source, 0), config, columns):
        if line.error is None:
            for look in (check_record, lambda *known: asked(*known, key="k")):
                try:
                    look(line.record, spec, spec.text_fields)
                    taken = True
                except Rejected:
                    pass
            day_of(line.record, "date")
            key_of(line.record.get("id"))
    return taken


def jsonl(folder: Path) -> Put:
    """Lines and arrays of JSON, zipped or not."""

    def put(rng: random.Random) -> bool:
        lines = [as_json(rng, mutated_value(rng, RECORD)) for _ in range(3)]
        data, name = b"\n".join(lines), "train.jsonl"
        if rng.random() < 0.2:
            data, name = b"[" + b",".join(lines) + b"]", "train.json"
        if rng.random() < 0.2:
            data, name = gzip.compress(data, 1), f"{name}.gz"
        path = folder / name
        path.write_bytes(mutated_bytes(rng, data) if rng.random() < 0.3 else data)
        return _look_at(path, rng.choice(TASKS))

    return put


def csv(folder: Path) -> Put:
    """Tables as text, in several dialects and encodings, told or found."""
    rows = [list(RECORD), *[[str(value) for value in RECORD.values()]] * 3]

    def cell(text: str, separator: str) -> str:
        return '"' + text.replace('"', '""') + '"' if separator in text or '"' in text or "\n" in text else text

    def put(rng: random.Random) -> bool:
        separator, encoding = rng.choice(",;\t|"), rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"))
        found = mutated_value(rng, rows, [v for v in VALUES if isinstance(v, str)])
        found = [row if isinstance(row, list) else [row] for row in found] if isinstance(found, list) else [[found]]
        text = "\n".join(separator.join(cell(str(value), separator) for value in row) for row in found)
        path = folder / "train.csv"
        path.write_bytes(mutated_bytes(rng, text.encode(encoding, "replace")))
        reading = rng.choice(("auto", {"delimiter": separator}, {"encoding": encoding.removesuffix("-sig")}))
        return _look_at(path, rng.choice(TASKS), csv=reading)

    return put


def parquet(folder: Path) -> Put:
    """Tables in columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for compression in ("none", "snappy", "gzip", "zstd"):
        for dictionary in (False, True):
            sink = pa.BufferOutputStream()
            table = pa.Table.from_pylist([{**RECORD, "other": {"a": ["x"]}, "image": b"\x89PNG"}] * 4)
            pq.write_table(table, sink, compression=compression, use_dictionary=dictionary)
            files.append(sink.getvalue().to_pybytes())

    def put(rng: random.Random) -> bool:
        data = rng.choice(files)
        if rng.random() < 0.5:  # in the footer, which stands last
            at = int.from_bytes(data[-8:-4], "little") + 8
            data = data[:-at] + mutated_bytes(rng, data[-at:-8]) + data[-8:]
        else:
            data = mutated_bytes(rng, data)
        path = folder / "train.parquet"
        path.write_bytes(data)
        return _look_at(path, rng.choice(TASKS))

    return put


def configuration(folder: Path) -> Put:
    """Files of settings, by their values and by their text, and overrides."""
    import yaml

    from jobs.config import load_config
    from jobs.config_file import PACKAGED

    names = sorted(PACKAGED.glob("*.yaml"))
    texts = [name.read_text() for name in names if name.stat().st_size < 3000]
    overrides = ("training.max_steps=5", "data.root=x", "tasks.a.template={x}", "seed=", "=1", "a.b.c=[1", "name=../x")

    def put(rng: random.Random) -> bool:
        text = rng.choice(texts)
        if rng.random() < 0.7:
            data = yaml.safe_dump(mutated_value(rng, yaml.safe_load(text)), allow_unicode=True).encode(
                "utf-8", "replace"
            )
        else:
            data = mutated_bytes(rng, text.encode())
        path = folder / "run.yaml"
        path.write_bytes(data)
        load_config(path, [*(rng.choice(overrides) for _ in range(rng.choice((0, 0, 1)))), f"run_root={folder}/runs"])
        return True

    return put


def _shards(folder: Path) -> ShardManifest:
    from pipeline.ingestion.shards import write_shard

    spec = TASKS[0]
    infos = []
    for number in range(2):
        samples = [
            Sample(
                key=f"{number}-{row}",
                task=spec.name,
                fields={"text": f"text {row}"},
                label=row % 2,
                image=image_bytes("PNG") if row == 2 else None,
            )
            for row in range(4)
        ]
        infos.append(write_shard(folder, spec.name, "train", number, samples))
    manifest = ShardManifest(tasks=(spec,), shards=tuple(infos), source_sha256="0")
    manifest.write(folder / "manifest.json")
    return manifest


def _read_shards(folder: Path, split: str = "train") -> None:
    from pipeline.stream import MixedStream, read_split

    stream = MixedStream(folder, 0, 4, split=split)
    assert len(stream.global_batch(0)) == 4
    for sample in read_split(folder, split):
        assert sample.task


def manifest(folder: Path) -> Put:
    """The list of shards, with the shards beside it."""
    shards = folder / "shards"
    shards.mkdir()
    _shards(shards)
    path = shards / "manifest.json"
    known, text = json.loads(path.read_text()), path.read_bytes()
    strange = [*VALUES, "../manifest.json", "/etc/passwd", "binary-train-000001.tar", "s3://b/x.tar", "a::b", "pipe:id"]

    def put(rng: random.Random) -> bool:
        whole = rng.random() < 0.6
        path.write_bytes(as_json(rng, mutated_value(rng, known, strange)) if whole else mutated_bytes(rng, text))
        _read_shards(shards)
        return True

    return put


def tar(folder: Path) -> Put:
    """Shards of our own without an index, and those of others."""
    shards = folder / "shards"
    shards.mkdir()
    first = _shards(shards).shards[0]
    data = (shards / first.path).read_bytes()
    alone = shards / "alone"
    alone.mkdir()

    def put(rng: random.Random) -> bool:
        changed = mutated_bytes(rng, data)
        if rng.random() < 0.6:  # a header's checksum kept right lets the change through to what reads it
            at = rng.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
            header = bytearray((data[:at] + mutated_bytes(rng, data[at : at + 500]))[at : at + 512].ljust(512, b"\0"))
            header[148:156] = b" " * 8
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            changed = data[:at] + bytes(header) + data[at + 512 :]
        path = alone / first.path
        path.write_bytes(changed)
        if rng.random() < 0.5:
            info = first.model_copy(
                update={
                    "bytes": max(len(changed), 1),
                    "sha256": hashlib.sha256(changed).hexdigest(),
                    "index_sha256": None,
                }
            )
            ShardManifest(tasks=TASKS[:1], shards=(info,), source_sha256="0").write(alone / "manifest.json")
            _read_shards(alone)
            return True
        return _look_at(path, TASKS[0])

    return put


def index(folder: Path) -> Put:
    """Indexes of shards, whose digest the manifest is told anew."""
    import io

    from pipeline.shard_index import ShardIndex, index_path

    shards = folder / "shards"
    shards.mkdir()
    known = _shards(shards)
    first = known.shards[0]
    path = shards / index_path(first.path)
    data = path.read_bytes()
    with np.load(io.BytesIO(data)) as found:
        arrays = {name: found[name] for name in found.files}
    kinds = ("i8", "u8", "i4", "f8", "u1", "U3", "M8[s]", "?")

    def changed(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutated_bytes(rng, data)
        other = {name: array.copy() for name, array in arrays.items()}
        name = rng.choice(list(other))
        array, kind = other[name], rng.randrange(6)
        if kind == 0:
            other[name] = array[: rng.randrange(len(array) + 1)]
        elif kind == 1 and array.size:
            limits = np.iinfo(array.dtype)
            array.flat[rng.randrange(array.size)] = rng.choice((limits.min, limits.max, 0, 1, 7, 2048 % limits.max))
        elif kind == 2:
            other[name] = array.astype(rng.choice(kinds))
        elif kind == 3:
            other[name] = array.reshape(-1, 1) if array.ndim == 1 else array.reshape(-1)
        elif kind == 4:
            del other[name]
        else:
            other[rng.choice(("extensions", "more", "keys"))] = np.frombuffer(b"txt\ncls", np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **other)
        return buffer.getvalue()

    def put(rng: random.Random) -> bool:
        new = changed(rng)
        if rng.random() < 0.7:
            ShardIndex.from_bytes(new, "x")
        path.write_bytes(new)
        info = first.model_copy(update={"index_sha256": hashlib.sha256(new).hexdigest()})
        known.model_copy(update={"shards": (info, *known.shards[1:])}).write(shards / "manifest.json")
        _read_shards(shards)
        return True

    return put


def image(folder: Path) -> Put:
    """Encoded pixels."""
    import base64

    from pipeline.images import decoded
    from pipeline.record import image_asked

    files = [image_bytes(form, size=size) for form in ("PNG", "JPEG", "WEBP") for size in ((4, 3), (40, 50))]
    files += [image_bytes("PNG", mode=mode, colour=0) for mode in ("1", "L", "P", "I;16")]
    files += [image_bytes("PNG", mode="RGBA", colour=(1, 2, 3, 4)), image_bytes("GIF"), image_bytes("TIFF")]

    def put(rng: random.Random) -> bool:
        data = mutated_bytes(rng, rng.choice(files))
        if rng.random() < 0.2:
            image_asked({"image": base64.b64encode(data).decode()}, "image")
        pixels = decoded(data)
        assert pixels.mode == "RGB"
        return True

    return put


def adapter(folder: Path) -> Put:
    """An adapter's folder, with its hashes and without, as training, serving and exports read it."""
    import torch
    from torch import nn

    from mtl_lora import MTLLoRAConfig, MTLLoRAModel
    from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE
    from mtl_lora.hashes import HASHES_FILE
    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2))

    made, tried = folder / "made", folder / "tried"
    model = MTLLoRAModel(base(), MTLLoRAConfig(["a", "b"], r=1, target_modules=["0"]))
    model.save_pretrained(made)
    PredictorSpec(tasks=TASKS[:2], base=BaseModelConfig(num_layers=2)).write(made / PREDICTOR_FILE)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    names = (CONFIG_FILE, WEIGHTS_FILE, PREDICTOR_FILE, HASHES_FILE)
    tried.mkdir()

    def put(rng: random.Random) -> bool:
        name, has_hashes = rng.choice(names), rng.random() < 0.2
        changed = mutated_bytes(rng, files[name])
        if name.endswith(".json") and rng.random() < 0.7:
            changed = as_json(rng, mutated_value(rng, json.loads(files[name])))
        elif name == WEIGHTS_FILE and rng.random() < 0.7:
            length = int.from_bytes(files[name][:8], "little")
            header = as_json(rng, mutated_value(rng, json.loads(files[name][8 : 8 + length])))
            changed = len(header).to_bytes(8, "little") + header + files[name][8 + length :]
        for each, data in files.items():
            (tried / each).unlink(missing_ok=True)
            if each != HASHES_FILE or has_hashes or name == HASHES_FILE:
                (tried / each).write_bytes(changed if each == name else data)
        PredictorSpec.read(tried / PREDICTOR_FILE)
        MTLLoRAModel.from_pretrained(base(), tried)
        return True

    return put


def checkpoint(folder: Path) -> Put:
    """A checkpoint's folder, as training goes on from it."""
    import torch

    from pipeline.training.checkpoint import Checkpoints, read_checkpoint

    sha256 = "a" * 64
    made, tried = folder / "made", folder / "tried"

    def weights(place: Path) -> None:
        place.mkdir(parents=True)
        (place / "adapter_model.safetensors").write_bytes(b"weights")

    step = Checkpoints(made, sha256).save(
        5, {"weight/x": torch.ones(2, 3)}, {"step": 5}, weights, num_ranks=1, zero_stage=1, best=True
    )
    files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    manifest = json.loads((step / "manifest.json").read_text())
    strange = [*VALUES, "../../../etc/passwd", "/etc/passwd", "b" * 64]

    def put(rng: random.Random) -> bool:
        shutil.rmtree(tried, ignore_errors=True)
        name = rng.choice(list(files))
        changed = {**files, name: mutated_bytes(rng, files[name])}
        told = json.loads(json.dumps(manifest))
        if rng.random() < 0.6:  # its hash told anew: what is read then is what was changed
            inner = name.partition("/")[2]
            if inner in told["files"]:
                told["files"][inner] = hashlib.sha256(changed[name]).hexdigest()
                changed[f"{step.name}/manifest.json"] = json.dumps(told).encode()
            elif inner:
                changed[name] = as_json(rng, mutated_value(rng, told, strange))
        for each, data in changed.items():
            (tried / each).parent.mkdir(parents=True, exist_ok=True)
            (tried / each).write_bytes(data)
        kept = Checkpoints(tried, sha256)
        kept.refuse_foreign()
        kept.best()
        newest = kept.newest()
        if newest is None:
            return False
        read_checkpoint(newest)
        return True

    return put


def run_folder(folder: Path) -> Put:
    """What a run's folder holds beside its artefacts: its binding, its history, its reports."""
    from jobs.run_folder import BASE_EVALUATION, DECISION, EVALUATION, RunFolder
    from pipeline.tracking import read_history

    run = RunFolder(folder / "run")
    run.path.mkdir()
    report, comparison = _evaluated()
    decision = _decided(report, comparison)
    known = {
        "run.json": {"schema": 1, "config_sha256": "a" * 64, "mlflow_uri": "sqlite:///x", "mlflow_run_id": "b" * 32},
        "history.jsonl": {"step": 10, "loss": 0.5, "task_loss": {"a": 1.0}, "time_ms": 1},
        EVALUATION.name: report.model_dump(mode="json", by_alias=True),
        BASE_EVALUATION.name: report.model_dump(mode="json", by_alias=True),
        DECISION.name: decision.model_dump(mode="json", by_alias=True),
    }

    def put(rng: random.Random) -> bool:
        name = rng.choice(list(known))
        for each, value in known.items():
            data = as_json(rng, mutated_value(rng, value)) if each == name else json.dumps(value).encode()
            (run.path / each).write_bytes(data + b"\n")
        run.check_configuration("a" * 64)
        for row in read_history(run.history):
            assert isinstance(row["step"], int)
        for file in (EVALUATION, BASE_EVALUATION, DECISION):
            run.find(file)
        return True

    return put


def _evaluated() -> tuple[EvaluationReport, Comparison]:
    from pipeline.evaluation.compare import compare
    from pipeline.evaluation.summary import summarize
    from tests.pipeline.evaluation.simulated import scores, specs

    frame = scores(0.8, seed=1)
    data = {"manifest_sha256": "a" * 64, "split": "test"}
    report = summarize(frame, specs(), model="c", data=data, replicates=50)
    paired = compare(
        frame, scores(0.9, seed=1), specs(), candidate_name="c", reference_name="7", data=data, replicates=50
    )
    return report, paired


def _decided(report: EvaluationReport, comparison: Comparison, gates: Any = None) -> Any:
    from pipeline.promotion.evidence import Evidence, Opponent
    from pipeline.promotion.gates import GatesConfig
    from pipeline.promotion.policy import decide

    opponent = Opponent("7", report, comparison)
    return decide(report, Evidence(Opponent("base", report, comparison), opponent), gates or GatesConfig())


def gates(folder: Path) -> Put:
    """Reports, comparisons and limits: what is decided rests on finite numbers or holds."""
    from jobs.config import load_config

    report, comparison = _evaluated()
    files = {
        "evaluation.json": report.model_dump(mode="json", by_alias=True),
        "comparison.json": comparison.model_dump(mode="json", by_alias=True),
    }
    limits = {"margin": 0.01, "max_ece": 0.1, "calibration_ratio": [0.8, 1.25], "margins": {"a": 0.1}, "min_samples": 5}
    task = {"template": "{text}", "label_words": [" no", " yes"]}
    numbers = [*VALUES, -0.5, 2, 1e-9, float("nan"), float("inf"), "0.1", [0, 1], [1.25, 0.8], {"a": float("nan")}]

    def put(rng: random.Random) -> bool:
        which = rng.choice(("evaluation.json", "comparison.json", "evaluation.json", "gates"))
        configured = None
        if which == "gates" and rng.random() < 0.5:
            values = {
                "name": "x",
                "data": {"source": "records", "root": "."},
                "tasks": {"a": task},
                "promotion": {"gates": mutated_value(rng, limits, numbers)},
            }
            (folder / "run.yaml").write_bytes(as_json(rng, values))
            configured = load_config(folder / "run.yaml", [f"run_root={folder}/runs"]).promotion.gates
        for name, value in files.items():
            data = as_json(rng, mutated_value(rng, value, numbers)) if name == which else json.dumps(value).encode()
            (folder / name).write_bytes(data)
        found = EvaluationReport.read(folder / "evaluation.json")
        paired = Comparison.read(folder / "comparison.json")
        decision = _decided(found, paired, configured)
        return bool(decision.reasons)

    return put


class _Answers:
    """A registry that answers with versions whose tags somebody has changed."""

    def __init__(self) -> None:
        self.versions: list[Any] = []

    def search_model_versions(self, *_: Any, **__: Any) -> Any:
        class Page(list[Any]):
            token = None

        return Page(self.versions)


def ledger(folder: Path) -> Put:
    """Entries of the ledger of champions and of the lease, changed in the registry."""
    from pipeline.promotion.entries import champions, running_hash, signature
    from pipeline.promotion.lease import Lease
    from pipeline.promotion.ledger import Ledger

    client = _Answers()
    book, lease = Ledger(client, "m"), Lease(client, "m")
    entries: list[dict[str, str]] = []
    before = ""
    for number in range(1, 4):
        tags = {
            "action": "promote",
            "version": str(number),
            "previous": str(number - 1) if number > 1 else "",
            "why": '["better"]',
            "who": "ads",
            "after": str(number - 1),
            "decision": f"PROMOTE {'d' * 64} anchor {number}",
            "before_sha256": before,
        }
        tags["sha256"] = signature(tags)
        entries.append(tags)
        client.versions = [SimpleNamespace(version=str(number), tags=tags, creation_timestamp=1, name="m")]
        before = running_hash(before, book.entries()[0])
    holding = {"after": "0", "who": "ads", "ttl_s": "120.0", "beat": "3 1700000000.5", "released": ""}
    texts = [
        *(v for v in VALUES if isinstance(v, str)),
        "1",
        "0",
        "-1",
        "²",
        "1 nan",
        "inf",
        "1e400",
        "[",
        '{"a": 1}',
        "١",
    ]

    def put(rng: random.Random) -> bool:
        is_ledger = rng.random() < 0.7
        found = [dict(tags) for tags in entries] if is_ledger else [dict(holding), {**holding, "after": "1"}]
        for _ in range(rng.choice((1, 1, 2))):
            tags = rng.choice(found)
            name = rng.choice(list(tags))
            if rng.random() < 0.15:
                tags.pop(name)
            elif rng.random() < 0.5:
                tags[name] = rng.choice(texts)
            else:
                tags[name] = mutated_bytes(rng, tags[name].encode("utf-8", "replace")).decode("utf-8", "replace")
            if is_ledger and rng.random() < 0.5 and {"action", "version", "why"} <= tags.keys():
                try:
                    tags["sha256"] = signature(tags)  # whoever edits may know how it is made
                except KeyError:
                    tags.pop("sha256", None)
        stamps = (1, 1_700_000_000_000, 0)
        client.versions = [
            SimpleNamespace(version=str(n), tags=tags, creation_timestamp=rng.choice(stamps), name="m")
            for n, tags in enumerate(found, 1)
        ]
        if not is_ledger:
            for one in lease._chain():
                assert one.number > 0
            return True
        chain = champions(book.standing())
        for entry in chain:
            assert entry.version >= 0 and (entry.anchor is None or entry.anchor >= 0)
        return bool(chain)

    return put


def tags(folder: Path) -> Put:
    """Tags of registered versions, which whoever may write to the registry may set."""
    from pipeline.promotion.card import model_card
    from pipeline.promotion.provenance import Foreign, Provenance

    made = Provenance.model_validate(
        {
            "run": "weekly",
            "manifest_sha256": "a" * 64,
            "tasks": ("a", "b"),
            "files": {"predictor.json": "b" * 64},
            "metrics": {"a": 0.5, "b": None},
            "window": ("2026-01-05", "2026-01-06"),
            "macro": 0.5,
            "parent": 3,
            "holdout": {"a": "c" * 64},
        }
    ).tags()

    def put(rng: random.Random) -> bool:
        found = mutated_value(rng, made, [v for v in VALUES if isinstance(v, str)])
        if rng.random() < 0.5:
            name = rng.choice(list(made))
            try:
                value = json.loads(made[name])
            except ValueError:
                value = made[name]
            found = {**made, name: as_json(rng, mutated_value(rng, value)).decode("utf-8", "replace")}
        if not isinstance(found, dict):
            return False
        found = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
        read = Provenance.from_tags(found)
        if isinstance(read, Foreign):
            return not read.reason.encode()  # a reason is UTF-8
        again = Provenance.from_tags(read.tags())
        assert again == read and model_card("m", TASKS, None, read)
        return True

    return put


class _NullScorer:
    """Scores without a model: what surrounds one is tried here."""

    def replies(self, samples: Sequence[Sample]) -> list[Any]:
        from pipeline.modeling.scoring import Reply

        known = {task.name: task.num_classes for task in TASKS}
        counts = [known[sample.task] or len(sample.choices) for sample in samples]
        return [Reply(np.full(count, 1 / count)) for count in counts]


def requests(folder: Path) -> Put:
    """Bodies, headers and rows that are sent to the server: each is answered with 200 or refused with 4xx."""
    from fastapi import Request

    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.predictor import Predictor, PredictorSpec
    from pipeline.serving.batching import Version
    from pipeline.serving.server import ScoreServer
    from pipeline.serving.server_config import ServerConfig

    predictor = Predictor(PredictorSpec(tasks=TASKS, base=BaseModelConfig()), _NullScorer())  # type: ignore[arg-type]
    version = Version("models:/m/1", predictor)

    async def answer(asked: Any) -> Any:
        return version.words, version.answer_each(asked)

    models = SimpleNamespace(answer=SimpleNamespace(remote=answer))
    kind = ScoreServer.func_or_class.__mro__[1]  # the class itself, without the replica that Ray Serve makes of it
    server = kind(ServerConfig(model="models:/m@champion", max_rows=8, max_bytes=1 << 16), models)
    loop = asyncio.new_event_loop()
    server._live._watch = asyncio.Future(loop=loop)  # nothing is followed: there is no challenger
    body = {"rows": [RECORD, {"task": "pick", "text": "x", "choices": ["a", "b"]}], "key": "user-1"}
    body["rows"][0] = {name: RECORD[name] for name in ("task", "text", "other", "image")}  # type: ignore[index]

    async def ask(data: bytes, headers: list[tuple[bytes, bytes]]) -> Any:
        parts = [data[: len(data) // 2], data[len(data) // 2 :]]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers, "query_string": b""}
        return await server.score(Request(scope, receive))

    def put(rng: random.Random) -> bool:
        value = mutated_value(rng, body, [*VALUES, *(task.name for task in TASKS), [RECORD] * 9])
        data = as_json(rng, value) if rng.random() < 0.8 else mutated_bytes(rng, json.dumps(body).encode())
        headers = [(b"x-request-id", mutated_bytes(rng, b"request-1")), (b"authorization", rng.randbytes(9))]
        found = loop.run_until_complete(ask(data, headers))
        assert found.status_code == 200 or 400 <= found.status_code < 500, f"{found.status_code} {found.body!r}"
        told = json.loads(found.body)
        assert b"Traceback" not in found.body and ("error" in told) == (found.status_code != 200)
        return bool(found.status_code == 200)

    return put


def answers(folder: Path) -> Put:
    """What a completions server answers: scores out of it are finite, or it is refused."""
    from http.server import BaseHTTPRequestHandler

    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.encoding import Encoder
    from pipeline.serving.exported_task import ExportedBase, ExportedTask
    from pipeline.serving.openai_client import LabelClient
    from tests.pipeline.local_server import LocalServer
    from tests.pipeline.modeling.tiny import tiny_tokenizer

    class Server(LocalServer):
        """Answers with what it is told to."""

        body, status = b"", 200

        def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
            request.rfile.read(int(request.headers["Content-Length"]))
            request.send_response(self.status)
            request.send_header("Content-Length", str(len(self.body)))
            request.end_headers()
            request.wfile.write(self.body)

    spec, tokenizer = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes")), tiny_tokenizer()
    base = BaseModelConfig(max_length=48)
    words = Encoder(tokenizer, [spec], base.max_length).label_tokens("t")
    task = ExportedTask(
        name="t",
        kind="binary",
        template=spec.template,
        label_words=spec.label_words,
        label_tokens=tuple(map(tuple, words)),
        label_values=(),
        choices_field=None,
        length_normalized=False,
        max_length=48,
        base=ExportedBase(name="tiny", fingerprint=None),
    )
    server = Server().__enter__()
    server._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asks may hang up
    client = LabelClient(server.url, task, tokenizer, timeout_s=2)
    rows = [{"text": "ab"}]
    length = len(client._encoder.encode([client._sample("0", rows[0])])[0].prompt) + len(words[0])
    good = {
        "choices": [
            {"index": n, "text": "x", "logprobs": {"token_logprobs": [None, *[-0.5 - n] * length]}} for n in range(2)
        ]
    }

    def put(rng: random.Random) -> bool:
        server.status = rng.choice((200,) * 20 + (204, 404, 500, 503))
        server.body = as_json(rng, mutated_value(rng, good, [*VALUES, float("-inf")]))
        (found,) = client.probabilities(rows)
        assert found.shape == (2,) and np.isfinite(found).all() and abs(found.sum() - 1) < 1e-9, found
        return True

    return put


def messages(folder: Path) -> Put:
    """Lines of a job's log: a result is one only under the job's own token."""
    from pipeline.progress import Result, WorkDone, received

    token = "0123456789abcdef"
    kinds = (
        {"kind": "result", "value": {"verdict": "PROMOTE"}},
        {
            "kind": "progress",
            "what": "train",
            "done": 3,
            "total": 9,
            "unit": "steps",
            "seconds_spent": 1.5,
            "seconds_left": None,
        },
        {"kind": "said", "text": "hello"},
    )

    def put(rng: random.Random) -> bool:
        told = token if rng.random() < 0.7 else rng.choice(("", "x", token[:-1], token.upper(), f" {token}", "None"))
        fields = as_json(rng, mutated_value(rng, rng.choice(kinds))).decode("utf-8", "replace")
        line = f"@mtl-lora {told} {fields}".replace("\n", " ")
        if rng.random() < 0.3:
            line = mutated_bytes(rng, line.encode()).decode("utf-8", "replace")
        found = received(line, token)
        assert not isinstance(found, Result) or line.startswith(f"@mtl-lora {token} ")
        if isinstance(found, WorkDone | Result):
            assert str(found)
        return found is not None

    return put


SURFACES: dict[str, Callable[[Path], Put]] = {
    surface.__name__: surface
    for surface in (
        *(jsonl, csv, parquet, configuration, manifest, tar, index, image, adapter, checkpoint, run_folder, gates),
        *(ledger, tags, requests, answers, messages),
    )
}
"""Name → the door."""
