"""A record's weight, from its field to the sample."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.schemas import record_schema
from pipeline.stream import read_split
from pipeline.validate import Rejected, check_record

SPEC = TaskSpec(name="clicks", template="{text}:", label_words=(" no", " yes"), weight_field="importance")


def test_weights_reach_the_samples_and_bad_ones_are_put_aside(tmp_path: Path) -> None:
    rows = [{"text": f"ad {n}", "label": n % 2, "importance": value} for n, value in enumerate([1, 0.25, "3", 0])]
    (tmp_path / "in" / "clicks").mkdir(parents=True)
    for split in ("train", "test"):
        with gzip.open(tmp_path / "in" / "clicks" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row | {"text": f"{split} {row['text']}"}) + "\n" for row in rows)
    config = DataConfig(source="records", root=str(tmp_path / "in"), max_rejected_share=0.5)
    manifest = prepare(config, [SPEC], tmp_path / "out", seed=0)
    assert sorted(s.weight for s in read_split(tmp_path / "out", "train")) == [0.25, 1.0, 3.0]
    assert {r.reason for r in manifest.rejected} == {"weight 'importance' is not a number > 0"}


@pytest.mark.parametrize("value", [None, -1, "heavy", float("nan"), float("inf"), True, [2]])
def test_a_weight_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(Rejected, match="weight 'importance'"):
        check_record({"text": "x", "label": 1, "importance": value}, SPEC, SPEC.text_fields)


def test_the_schema_asks_for_the_weight() -> None:
    assert "importance" in record_schema(SPEC)["required"]
