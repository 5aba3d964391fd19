"""Surfaces of records: files of several forms, and what the others share."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

from pipeline.contracts import TaskSpec
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


def look_at(location: Path, spec: TaskSpec, task: str = "*", **reading: Any) -> bool:
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
        return look_at(path, rng.choice(TASKS))

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
        return look_at(path, rng.choice(TASKS), csv=reading)

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
        return look_at(path, rng.choice(TASKS))

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
