from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.ingestion import record_schema, write_schemas
from pipeline.synthetic import synthetic_ads_tasks
from pipeline.validate import Rejected, check_record

TASKS = (
    TaskSpec(name="pair", template="{a}\n{b}:", label_words=(" no", " yes")),
    TaskSpec(name="quiz", kind="choice", template="{a}:"),
    TaskSpec(name="stars", kind="multiclass", template="{a}:", label_words=(" 2", " 3", " 4"), labels_are="word"),
    TaskSpec(name="high", kind="ordinal", template="{a}:", label_words=(" 3", " 4"), label_values=(0, 1)),
    TaskSpec(name="grade", kind="ordinal", template="{a}:", label_words=(" 0", " 1", " 2"), label_values=(0, 1, 2)),
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 4), st.floats(), st.sampled_from(["", " ", "x", "yes", "1", '["x","y"]']),
    st.lists(st.sampled_from(["x", "y", "", 1]), max_size=3),
)  # fmt: skip
RECORDS = st.dictionaries(st.sampled_from(["a", "b", "label", "answer", "choices", "more"]), VALUES)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_whatever_validation_takes_the_published_schema_allows(task: TaskSpec) -> None:
    schema = record_schema(task)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    seen = []

    @given(record=RECORDS)
    def law(record: dict[str, Any]) -> None:
        try:
            check_record(record, task, task.text_fields)
        except Rejected:
            return
        seen.append(record)
        validator.validate(record)

    law()
    good = {"a": "x", "b": "y", "label": 1, "answer": 1, "choices": ["x", "y"]}
    validator.validate(good)
    for missing in (*task.text_fields, task.label_field):
        assert not validator.is_valid({k: v for k, v in good.items() if k != missing})
    assert not validator.is_valid({**good, task.label_field: 7} if task.kind != "choice" else {**good, "choices": []})


def test_schemas_are_written_for_tasks_and_artefacts(tmp_path: Path) -> None:
    paths = write_schemas(synthetic_ads_tasks(), tmp_path)
    assert {"record-query_vertical.schema.json", "ShardManifest.schema.json"} <= {path.name for path in paths}
    for path in paths:
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_the_schema_names_the_columns_of_the_records_and_their_labels() -> None:
    columns = {"a": "Title", "b": "more.text", "label": "verdict"}
    task = TASKS[0].model_copy(update={"columns": columns, "label_map": {"bad": 0, "good": 1}})
    schema = record_schema(task)
    assert schema["required"] == ["Title", "more", "verdict"]
    assert jsonschema.Draft202012Validator(schema).is_valid({"Title": "t", "more": {"text": "u"}, "verdict": "good"})
