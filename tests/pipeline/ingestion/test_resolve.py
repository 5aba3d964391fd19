from __future__ import annotations

import importlib
import json
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.resolve import _BUCKET, CONFLICT, DUPLICATE, KEEP, OVERLAP, SEEN, judge
from pipeline.stream import read_split
from tests.pipeline.ingestion.test_resume_and_append import content

resolve_module = importlib.import_module("pipeline.ingestion.resolve")
SPAM = TaskSpec(name="spam", template="{text}\nSpam:", label_words=(" no", " yes"))
POLICIES = {
    "duplicates": ["drop", "keep"],
    "overlap": ["drop_train", "drop_evaluation", "keep"],
    "conflicts": ["majority", "drop", "first", "keep"],
}


def reference(rows: list[tuple[int, int, bool]], policy: DataConfig) -> list[int]:
    """The policy in plain words: rows are (text, label, is train), in source order."""
    codes = [KEEP] * len(rows)
    texts = defaultdict(list)
    for place, (text, _, _) in enumerate(rows):
        texts[text].append(place)
    for places in texts.values():
        train = [p for p in places if rows[p][2]]
        other = [p for p in places if not rows[p][2]]
        if train and other and policy.overlap != "keep":
            for p in train if policy.overlap == "drop_train" else other:
                codes[p] = OVERLAP
        train = [p for p in train if codes[p] == KEEP]
        counts = Counter(rows[p][1] for p in train)
        if len(counts) > 1 and policy.conflicts != "keep":
            winners = [label for label, n in counts.items() if n == max(counts.values())]
            if policy.conflicts == "first":
                winners = [rows[train[0]][1]]
            kept = winners if len(winners) == 1 and policy.conflicts != "drop" else []
            for p in train:
                if rows[p][1] not in kept:
                    codes[p] = CONFLICT
        if policy.duplicates == "drop":
            seen = set()
            for p in train:
                if codes[p] == KEEP and rows[p][1] in seen:
                    codes[p] = DUPLICATE
                seen |= {rows[p][1]} if codes[p] == KEEP else set()
    return codes


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2), st.booleans()), max_size=40),
    policy=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in POLICIES.items()}),
)
def test_judge_agrees_with_the_policy_in_plain_words(rows: list[tuple[int, int, bool]], policy: dict[str, str]) -> None:
    config = DataConfig(**policy)
    table = np.zeros(len(rows), dtype=_BUCKET)
    for place, (text, label, train) in enumerate(rows):
        table[place] = (text // 2, text, label, -1 if train else 0, 0, place)
    assert judge(table, config, np.zeros((0, 2), dtype=np.uint64)).tolist() == reference(rows, config)


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_kept_and_dropped_records_add_up_and_say_why(tmp_path: Path) -> None:
    train = [{"text": t, "label": y} for t, y in [("a", 0), ("a", 0), ("b", 1), ("c", 0), ("c", 1), ("d", 1), ("c", 1)]]
    write(tmp_path / "in/spam/train.jsonl", train)
    write(tmp_path / "in/spam/test.jsonl", [{"text": "b", "label": 1}, {"text": "e", "label": 0}])
    config = DataConfig(source="records", root=str(tmp_path / "in"))
    manifest = prepare(config, [SPAM], tmp_path / "out", seed=0)
    assert [(s.fields["text"], s.label) for s in read_split(tmp_path / "out", "train")] == [
        ("a", 0),
        ("c", 1),
        ("d", 1),
    ]
    assert [s.fields["text"] for s in read_split(tmp_path / "out", "test")] == ["b", "e"]
    assert {r.reason: r.records for r in manifest.rejected} == {
        "texts and label stand in an earlier record": 2,
        "texts stand in train and in another split": 1,
        "label differs from other records of the same texts": 1,
    }


def test_records_with_one_id_keep_their_samples_under_other_keys(tmp_path: Path) -> None:
    write(tmp_path / "in/spam/train.jsonl", [{"id": "a.b", "text": f"t{i}", "label": 0} for i in range(3)])
    prepare(DataConfig(source="records", root=str(tmp_path / "in")), [SPAM], tmp_path / "out", seed=0)
    assert [s.key for s in read_split(tmp_path / "out", "train")] == [
        "a-b",
        "a-b--u0000-000000002",
        "a-b--u0000-000000003",
    ]


@given(ids=st.lists(st.one_of(st.none(), st.text("a-.1", max_size=4)), min_size=1, max_size=30))
@settings(max_examples=15, deadline=None)
def test_keys_are_unique_whatever_the_ids(tmp_path_factory: pytest.TempPathFactory, ids: list[str | None]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    write(folder / "in/spam/train.jsonl", [{"id": i, "text": f"t{n}", "label": 0} for n, i in enumerate(ids)])
    prepare(DataConfig(source="records", root=str(folder / "in")), [SPAM], folder / "out", seed=0)
    keys = [s.key for s in read_split(folder / "out", "train")]
    assert len(set(keys)) == len(ids)


def test_earlier_texts_that_no_record_may_match_take_no_memory_of_their_own() -> None:
    seen = np.stack([np.arange(400_000), np.arange(400_000)], axis=1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = np.zeros(3, dtype=_BUCKET)
    rows["high"], rows["low"] = [seen[5, 0], seen[6, 0], 1], [seen[5, 1], 9, 1]  # seen, half of one seen, new
    tracemalloc.start()
    try:
        codes = judge(rows, DataConfig(), seen)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert codes.tolist() == [SEEN, KEEP, KEEP]
    assert peak < 6 * seen.nbytes


@given(records=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=9, max_size=40))
@settings(max_examples=10, deadline=None)
def test_buckets_and_chunks_of_any_size_give_the_same_shards(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("buckets")
    for number, name in enumerate(("train-0", "train-1", "test")):
        rows = [{"id": f"i{text % 3}", "text": f"{text}", "label": label} for text, label in records[number::3]]
        rows.append({"id": "i0", "text": f"only in {name}", "label": 0})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        source="records", root=str(folder), files={"spam": {"train": "train-*.jsonl", "test": "test.jsonl"}}
    )
    found = []
    for size in (1 << 20, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve_module, "BUCKET_ROWS", size)
            patch.setattr(resolve_module, "CHUNK_ROWS", size)
            prepare(config, [SPAM], folder / str(size), seed=0)
            found.append(content(folder / str(size)))
    assert found[0] == found[1]
