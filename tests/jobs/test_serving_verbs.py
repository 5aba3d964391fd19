"""What ``score`` takes: the model knows how its records are written, and a word on the command line goes over that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.config import RunConfig
from jobs.run import Run
from jobs.serving_verbs import _reading
from jobs.stages.train import _keep_adapter
from mtl_lora.files import WEIGHTS_FILE
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

KNOWN = DataConfig.model_validate(
    {
        "source": "records",
        "root": "data",
        "max_rejected": 3,
        "csv": {"delimiter": ";", "encoding": "cp1252"},
        "columns": {"id": "Row Id"},
    }
).reading()


def test_a_model_keeps_how_records_are_found_and_nothing_else_of_its_data() -> None:
    assert KNOWN == {"csv": {"delimiter": ";", "encoding": "cp1252"}, "columns": {"id": "Row Id"}}
    assert DataConfig(source="records", root="data").reading() == {}


def test_the_command_goes_over_what_the_model_knows() -> None:
    found = _reading(KNOWN, ['data.csv.delimiter="\\t"', "data.columns.task=Kind", "data.json_encoding=latin-1"])
    assert (found.csv.delimiter, found.csv.encoding, found.json_encoding) == ("\t", "cp1252", "latin-1")
    assert found.columns == {"id": "Row Id", "task": "Kind"}
    assert _reading(KNOWN, []).reading() == KNOWN


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.windows.train=[1,2]", r"score takes keys of data .*csv.*, got \['windows'\]"),
        ("training.max_steps=3", r"got \['training'\]"),
        ("data.csv.encoding=utf-99", "must be one that Python knows"),
        ("delimiter", "must read key.sub=value"),
    ],
)
def test_what_is_no_reading_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _reading({}, [override])


def test_a_trained_adapter_says_how_its_records_were_read(tmp_path: Path) -> None:
    settings = {
        "name": "run",
        "run_root": tmp_path,
        "tasks": {"t": {"template": "{text}:", "label_words": [" no", " yes"]}},
    }
    for name, data in (("told", {"csv": {"delimiter": ";"}}), ("plain", {})):
        config = RunConfig.model_validate(
            {**settings, "name": name, "data": {"source": "records", "root": "data", **data}}
        )
        (tmp_path / "checkpoint" / "adapter").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint" / "adapter" / WEIGHTS_FILE).write_bytes(b"")
        config.folder.mkdir()
        _keep_adapter(Run(config), tmp_path / "checkpoint")
        written = PredictorSpec.read(config.folder / "adapter" / PREDICTOR_FILE)
        assert written.reading == data
        assert ("reading" in json.loads((config.folder / "adapter" / PREDICTOR_FILE).read_text())) == bool(data)
