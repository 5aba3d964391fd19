from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.shard_index import ShardIndex
from pipeline.stream import read_split
from tests.pipeline.made_images import image_bytes

SPAM = TaskSpec(name="spam", template="{text_a}\nSpam:", label_words=(" no", " yes"))
TEST_RECORDS = [{"id": f"spam.{i}", "text_a": f"test text {i}", "label": i % 2} for i in range(4)]
RECORDS = [{"id": f"spam.{i}", "text_a": f"text number {i}", "label": i % 2} for i in range(20)]
PNG = image_bytes("PNG")


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def records_config(root: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"source": "records", "root": str(root), **more})


def write_in(form: str, root: Path) -> None:
    folder = root / "spam"
    folder.mkdir(parents=True)
    for split, records in (("train", RECORDS), ("test", TEST_RECORDS)):
        path = folder / f"{split}.{form}"
        if form.startswith("jsonl"):
            write_jsonl(path, records)
        elif form == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
            data = text.getvalue().encode()
            path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_every_form_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    write_in(form, tmp_path / "in")
    prepare(records_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    samples = list(read_split(tmp_path / "out", "train"))
    assert [s.fields["text_a"] for s in samples] == [r["text_a"] for r in RECORDS]
    assert [s.label for s in samples] == [float(r["label"]) for r in RECORDS]
    assert samples[3].key == "spam-3"


def test_shards_are_plain_webdataset_and_the_same_bytes_again(tmp_path: Path) -> None:
    write_in("jsonl.gz", tmp_path / "in")
    config = records_config(tmp_path / "in", samples_per_shard=7)
    for out in ("a", "b"):
        manifest = prepare(config, [SPAM], tmp_path / out, seed=0)
    assert [s.samples for s in manifest.shards_of("spam", "train")] == [7, 7, 6]
    for shard in manifest.shards:
        assert (tmp_path / "a" / shard.path).read_bytes() == (tmp_path / "b" / shard.path).read_bytes()
    path = tmp_path / "a" / "spam-train-000000.tar"
    plain = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in plain] == [f"spam-{i}" for i in range(7)]
    assert plain[2]["json"]["fields"] == {"text_a": "text number 2"}


def test_prepared_data_is_not_prepared_again(tmp_path: Path) -> None:
    write_in("jsonl", tmp_path / "in")
    config = records_config(tmp_path / "in")
    first = prepare(config, [SPAM], tmp_path / "out", seed=0)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(config, [SPAM], tmp_path / "out", seed=0) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    (tmp_path / "out" / first.shards[0].path).unlink()
    assert prepare(config, [SPAM], tmp_path / "out", seed=0) == first
    assert (tmp_path / "out" / first.shards[0].path).is_file()
    assert prepare(config, [SPAM], tmp_path / "out", seed=1).source_sha256 != first.source_sha256


def test_rejected_records_are_kept_with_reason_source_and_line(tmp_path: Path) -> None:
    bad = [{"text_a": "x", "label": 7}, {"label": 1}, {"text_a": ["x"], "label": 0}, {"text_a": "x", "label": "maybe"}]
    write_jsonl(tmp_path / "in/spam/train.jsonl", RECORDS + bad)
    with (tmp_path / "in/spam/train.jsonl").open("ab") as file:
        file.write(b'{"text_a": "cut of')
    manifest = prepare(records_config(tmp_path / "in", max_rejected_share=0.5), [SPAM], tmp_path / "out", seed=0)
    assert sum(r.records for r in manifest.rejected) == 5
    rejects = [
        json.loads(line)
        for name in manifest.quarantine
        for line in gzip.decompress((tmp_path / "out" / name).read_bytes()).splitlines()
    ]
    assert [(r["line"], r["reason"]) for r in rejects] == [
        (21, "label 'label' is not a class index within 0 to 1"),
        (22, "field 'text_a' is missing"),
        (23, "field 'text_a' is not text"),
        (24, "label 'label' is neither a number nor a label word"),
        (25, "line is not JSON"),
    ]
    assert all(r["source"] == "spam/train.jsonl" for r in rejects)


def test_too_many_rejects_stop_the_run_with_the_worst_reasons(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/spam/train.jsonl", RECORDS + [{"text_a": "x", "label": 9}] * 3 + [{"label": 0}])
    with pytest.raises(InputError, match=r"4 of 24: 3 x label .* 1 x field 'text_a' is missing .* line 21"):
        prepare(records_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    with pytest.raises(InputError, match="and 3 in number"):
        prepare(records_config(tmp_path / "in", max_rejected_share=1, max_rejected=3), [SPAM], tmp_path / "o", seed=0)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("value", "label"), [(1, 1.0), (True, 1.0), ("1", 1.0), ("1.0", 1.0), ("yes", 1.0), (" no ", 0.0), (0.0, 0.0)]
)
def test_labels_may_be_numbers_words_or_truth_values(tmp_path: Path, value: object, label: float) -> None:
    write_jsonl(tmp_path / "in/spam/train.jsonl", [{"text_a": "x", "label": value}])
    prepare(records_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    assert [s.label for s in read_split(tmp_path / "out", "train")] == [label]


def test_mixed_files_are_told_apart_by_the_task_field(tmp_path: Path) -> None:
    other = SPAM.model_copy(update={"name": "ham"})
    mixed = [{**record, "task": ("spam", "ham")[i % 2]} for i, record in enumerate(RECORDS)]
    write_jsonl(tmp_path / "in/train.jsonl", mixed)
    prepare(records_config(tmp_path / "in"), [SPAM, other], tmp_path / "out", seed=0)
    assert [s.key for s in read_split(tmp_path / "out", "train", "ham")] == [f"spam-{i}" for i in range(1, 20, 2)]
    with pytest.raises(InputError, match=r"got 'ham' in .* line 2; known: spam"):
        prepare(records_config(tmp_path / "in"), [SPAM], tmp_path / "out2", seed=0)
    assert not [*(tmp_path / "out2").glob("*.tar"), *(tmp_path / "out2").glob("*.json")]


def test_missing_input_and_unknown_tasks_are_said_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have its train records in .* found none of"):
        prepare(records_config(tmp_path), [SPAM], tmp_path / "out", seed=0)
    with pytest.raises(InputError, match="got 'spma'; did you mean 'spam'"):
        prepare(records_config(tmp_path, files={"spma": {"train": "x.jsonl"}}), [SPAM], tmp_path / "out", seed=0)
    with pytest.raises(InputError, match=r"names must differ, got \['spam'\] twice"):
        prepare(records_config(tmp_path), [SPAM, SPAM], tmp_path / "out", seed=0)


def test_choices_and_images_are_carried(tmp_path: Path) -> None:
    quiz = TaskSpec(name="quiz", kind="choice", template="{question}\nAnswer:")
    shape = TaskSpec(
        name="shape",
        kind="multiclass",
        template="{question}\nAnswer:",
        label_words=(" circle", " square"),
        image_field="image",
    )
    write_jsonl(tmp_path / "quiz/train.jsonl", [{"question": "which?", "choices": ["a", "b", "c"], "answer": 2}])
    rows = [{"image": f"{name}.png", "question": "what?", "answer": "circle", "label": 0} for name in ("one", "gone")]
    write_jsonl(tmp_path / "shape/train.jsonl", rows)
    with zipfile.ZipFile(tmp_path / "shape/images.zip", "w") as archive:
        archive.writestr("one.png", PNG)
    prepare(records_config(tmp_path, max_rejected_share=0.5), [quiz, shape], tmp_path / "out", seed=0)
    (choice,) = read_split(tmp_path / "out", "train", "quiz")
    assert (choice.choices, choice.label) == (("a", "b", "c"), 2.0)
    (sample,) = read_split(tmp_path / "out", "train", "shape")
    assert sample.image == PNG
    manifest = ShardManifest.read(tmp_path / "out/manifest.json")
    assert [(r.reason, r.records) for r in manifest.rejected] == [("image is missing", 1)]


def test_max_samples_takes_a_seeded_sample_in_source_order(tmp_path: Path) -> None:
    write_in("jsonl", tmp_path / "in")
    config = records_config(tmp_path / "in", max_samples={"train": 8})
    keys = []
    for seed in (0, 0, 1):
        prepare(config, [SPAM], tmp_path / f"out{len(keys)}", seed=seed)
        keys.append([s.key for s in read_split(tmp_path / f"out{len(keys)}", "train")])
    assert keys[0] == keys[1] != keys[2]
    numbers = [int(key.split("-")[1]) for key in keys[0]]
    assert len(numbers) == 8 and numbers == sorted(numbers)


def test_lengths_are_counted_in_the_tokens_of_a_given_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    write_in("jsonl", tmp_path / "in")
    found = {}
    for name, tokenizer in (("characters", None), ("tokens", str(tmp_path / "tokenizer.json"))):
        config = records_config(tmp_path / "in", length_tokenizer=tokenizer)
        manifest = prepare(config, [SPAM], tmp_path / name, seed=0)
        index = ShardIndex.from_bytes((tmp_path / name / "spam-train-000000.index.npz").read_bytes(), name)
        found[name] = (manifest.source_sha256, index.lengths.tolist()[:2])
    assert found["characters"][1] == [len("text number 0\nSpam:")] * 2
    assert found["tokens"][1] == [4, 4]
    assert found["characters"][0] != found["tokens"][0]
    with pytest.raises(InputError, match=r"length_tokenizer must be a tokenizer.json, .* cannot be read"):
        prepare(records_config(tmp_path / "in", length_tokenizer="gone.json"), [SPAM], tmp_path / "out", seed=0)


def test_images_that_unpack_to_too_much_or_climb_out_are_rejected(tmp_path: Path) -> None:
    shape = TaskSpec(name="shape", template="{question}:", label_words=(" no", " yes"), image_field="image")
    names = ("bomb.png", "../one.png", "/etc/passwd", "pipe:cat", "text.png", "one.png")
    rows = [{"image": name, "question": f"what is {name}?", "label": 0} for name in names]
    write_jsonl(tmp_path / "in/shape/train.jsonl", rows)
    with zipfile.ZipFile(tmp_path / "in/shape/images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.png", PNG)
        archive.writestr("text.png", b"no image")
        with archive.open("bomb.png", "w") as file:
            for _ in range(17):
                file.write(b"\0" * (1 << 20))
    manifest = prepare(records_config(tmp_path / "in", max_rejected_share=1), [shape], tmp_path / "out", seed=0)
    assert [s.fields["question"] for s in read_split(tmp_path / "out", "train")] == ["what is one.png?"]
    assert {r.reason: r.records for r in manifest.rejected} == {
        "image is larger than 16777216 bytes": 1,
        "image name is not a relative path": 3,
        "image is neither PNG nor JPEG": 1,
    }


def test_images_that_cannot_be_decoded_are_put_aside_with_the_reason(tmp_path: Path) -> None:
    rows = [{"image": f"{name}.png", "question": f"is {name} round?", "label": 0} for name in ("cut", "good")]
    write_jsonl(tmp_path / "in/shape/train.jsonl", rows)
    with zipfile.ZipFile(tmp_path / "in/shape/images.zip", "w") as archive:
        archive.writestr("cut.png", PNG[: len(PNG) // 2])
        archive.writestr("good.png", PNG)
    manifest = prepare(records_config(tmp_path / "in", max_rejected_share=1), [SHAPE], tmp_path / "out", seed=0)
    assert [s.fields["question"] for s in read_split(tmp_path / "out", "train")] == ["is good round?"]
    assert {r.reason: r.records for r in manifest.rejected} == {"image cannot be decoded": 1}


SHAPE = TaskSpec(name="shape", template="{question}:", label_words=(" no", " yes"), image_field="image")


def write_shape(root: Path, day: str, image: bytes) -> None:
    write_jsonl(root / day / "shape.jsonl", [{"image": "one.png", "question": "round?", "label": 0}])
    with zipfile.ZipFile(root / day / "images.zip", "w") as archive:
        archive.writestr("one.png", image)


def test_images_are_told_apart_by_their_bytes_not_their_names(tmp_path: Path) -> None:
    for day, image in (("2026-01-05", PNG + b"a"), ("2026-01-06", PNG + b"b"), ("2026-01-07", PNG + b"a")):
        write_shape(tmp_path / "in", day, image)
    config = records_config(tmp_path / "in", windows={"train": ("2026-01-05", "2026-01-07")})
    manifest = prepare(config, [SHAPE], tmp_path / "out", seed=0)
    assert [s.image for s in read_split(tmp_path / "out", "train")] == [PNG + b"a", PNG + b"b"]
    assert {r.reason: r.records for r in manifest.rejected} == {"texts and label stand in an earlier record": 1}


@pytest.mark.parametrize("source", ["train.jsonl", "shape/train.jsonl"])
def test_replaced_images_are_prepared_anew(tmp_path: Path, source: str) -> None:
    path = tmp_path / "in" / source
    write_jsonl(path, [{"task": "shape", "image": "one.png", "question": "round?", "label": 0}])
    for image in (PNG + b"a", PNG + b"b"):
        with zipfile.ZipFile(path.parent / "images.zip", "w") as archive:
            archive.writestr("one.png", image)
        prepare(records_config(tmp_path / "in"), [SHAPE], tmp_path / "out", seed=0)
        assert [s.image for s in read_split(tmp_path / "out", "train")] == [image]


def test_an_image_whose_packed_bytes_are_damaged_is_rejected(tmp_path: Path) -> None:
    rows = [{"image": f"{name}.png", "question": f"is {name} round?", "label": 0} for name in ("bad", "good")]
    write_jsonl(tmp_path / "in/shape/train.jsonl", rows)
    path = tmp_path / "in/shape/images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bad.png", PNG * 9)
        archive.writestr("good.png", PNG)
        start = archive.getinfo("bad.png").header_offset + 30 + len("bad.png")
    data = bytearray(path.read_bytes())
    data[start] = 0xFF  # no kind of block
    path.write_bytes(data)
    manifest = prepare(records_config(tmp_path / "in", max_rejected_share=1), [SHAPE], tmp_path / "out", seed=0)
    assert [s.fields["question"] for s in read_split(tmp_path / "out", "train")] == ["is good round?"]
    assert {r.reason: r.records for r in manifest.rejected} == {"image cannot be unpacked": 1}
    path.write_bytes(data[:-30])
    with pytest.raises(InputError, match=r"images\.zip must be a whole zip archive, it is not: .*; copy it again"):
        prepare(records_config(tmp_path / "in"), [SHAPE], tmp_path / "out", seed=0)


@pytest.mark.parametrize("place", ["spam/train.jsonl", "train.jsonl"])
def test_a_task_name_that_is_not_text_is_rejected(tmp_path: Path, place: str) -> None:
    write_jsonl(tmp_path / "in" / place, [{**RECORDS[0], "task": ["spam"]}, {**RECORDS[1], "task": "spam"}])
    manifest = prepare(records_config(tmp_path / "in", max_rejected_share=1), [SPAM], tmp_path / "out", seed=0)
    assert [s.key for s in read_split(tmp_path / "out", "train")] == ["spam-1"]
    assert {r.reason: r.records for r in manifest.rejected} == {"task 'task' is not text": 1}


def test_no_task_name_in_a_task_s_own_file_is_like_none(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/spam/train.jsonl", [{**RECORDS[0], "task": None}])
    assert not prepare(records_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0).rejected
    assert [s.key for s in read_split(tmp_path / "out", "train")] == ["spam-0"]
