"""The registered model loads where nothing is installed but its own requirements, and names all it imports."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.promotion.packaging import input_example, package, requirements, signature
from tests.pipeline.promotion.conftest import TASKS

OWN = {"pipeline", "mtl_lora"}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, base = tmp_path_factory.mktemp("packaged") / "adapter", BaseModelConfig(num_layers=1, dtype="float32")
    torch.manual_seed(0)
    adapted: Any = build_adapter(AdapterConfig(), load_base(base), [t.name for t in TASKS])
    adapted.save_pretrained(folder)
    PredictorSpec(tasks=TASKS, base=base).write(folder / "predictor.json")
    return folder


@pytest.fixture(scope="module")
def packaged(predictor: Path) -> Iterator[Path]:
    with package(predictor, "# card") as model:
        yield model


def _imported(folder: Path) -> set[str]:
    """Return the top-level modules that a folder's code imports anywhere, its own and Python's left out."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - OWN - set(sys.stdlib_module_names)


def test_requirements_name_what_the_model_s_code_imports_and_no_more(packaged: Path) -> None:
    listed = (packaged / "requirements.txt").read_text().split()
    assert sorted(listed) == sorted(requirements())
    assert all(line == f"{name}=={version(name).split('+')[0]}" for line in listed for name in [line.split("==")[0]])
    distributions = packages_distributions()
    named = {line.split("==")[0] for line in listed}
    owners = [set(distributions[module]) for module in _imported(packaged)]
    assert [owner for owner in owners if not owner & named] == [{"peft"}]  # for the methods that are PEFT's own
    assert {name.split("==")[0] for name in requirements("dora")} == named | {"peft"}
    held = {name.split("==")[0] for name in requirements(quantization="4bit")}
    assert held == named | {"accelerate", "bitsandbytes"}
    assert named - set().union(*owners) <= {"tokenizers"}  # the model's tokenizer.json is bound to its version


def test_every_module_that_the_packaged_code_imports_travels_with_it(packaged: Path) -> None:
    code = packaged / "code"
    for path in code.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.split(".")[0] in OWN:
                    place = code / name.replace(".", "/")
                    assert place.with_suffix(".py").is_file() or place.is_dir(), f"{path.relative_to(code)}: {name}"


def test_nothing_in_the_package_is_unpickled_or_trains(packaged: Path) -> None:
    files = [str(path.relative_to(packaged)) for path in packaged.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt", ".joblib", ".pyc"))]
    assert not [name for name in files if "training" in name or "ingestion" in name]
    assert {"MLmodel", "MODEL_CARD.md", "requirements.txt", "input_example.json"} <= set(files)


@pytest.mark.parametrize(
    "name", ["predictor/adapter_model.safetensors", "predictor/predictor.json", "base/config.json"]
)
def test_a_packaged_model_whose_files_were_changed_does_not_load(packaged: Path, tmp_path: Path, name: str) -> None:
    import mlflow

    model = Path(shutil.copytree(packaged, tmp_path / "model"))
    with (model / "artifacts" / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match=f"{name.partition('/')[2]} was changed"):
        mlflow.pyfunc.load_model(str(model))


@pytest.fixture(scope="module")
def loaded(packaged: Path) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(packaged))


def test_rows_predict_without_the_columns_of_tasks_that_are_not_asked(loaded: Any) -> None:
    ads = pd.DataFrame({"task": ["query_ad"], "query": ["red shoes"], "ad": ["buy red shoes"], "clicks": [3]})
    picks = pd.DataFrame({"task": ["pick"], "query": ["two and two"], "choices": [["three", "four"]]})
    found = [loaded.predict(frame) for frame in (ads, picks, pd.concat([ads, picks]), pd.concat([picks, ads]))]
    assert [list(one["task"]) for one in found] == [["query_ad"], ["pick"], ["query_ad", "pick"], ["pick", "query_ad"]]
    labels = {"query_ad": found[0]["label_word"][0], "pick": found[1]["label_word"][0]}
    assert all(word == labels[task] for one in found for task, word in zip(one["task"], one["label_word"], strict=True))


def test_answers_are_what_the_signature_says(loaded: Any) -> None:
    signature = loaded.metadata.signature
    assert [(c.name, c.required) for c in signature.inputs] == [
        ("task", True),
        ("ad", False),
        ("query", False),
        ("choices", False),
    ]
    found = loaded.predict(loaded.input_example)
    assert list(found) == signature.outputs.input_names()
    assert list(found["task"]) == [task.name for task in TASKS]
    kinds = {"string": str, "double": float, "long": int}
    for column in signature.outputs:
        values = [v for cell in found[column.name] for v in (cell if column.name == "probabilities" else [cell])]
        name = column.type.dtype.name if column.name == "probabilities" else column.type.name
        assert {type(value.item() if hasattr(value, "item") else value) for value in values} == {kinds[name]}


def test_the_signature_takes_rows_under_the_columns_of_the_records_too() -> None:
    columns = {"question": "Q.text", "size": "Size", "choices": "options", "answer": "gold"}
    spec = TaskSpec(name="pick", kind="choice", template="{question} {size}:", columns=columns)
    found = {column.name: str(column.type) for column in signature((spec,)).inputs}
    assert found.keys() == {"task", "question", "size", "choices", "Q.text", "Q", "Size", "options"}
    assert found["Size"] == "DataType.string"
    assert found["Q"] == found["options"] == found["choices"] == "Any"


def test_rows_without_a_task_are_refused(loaded: Any) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=r"missing inputs \['task'\]"):
        loaded.predict(pd.DataFrame({"query": ["red shoes"], "ad": ["buy red shoes"]}))


CLEAN = """
import importlib.machinery, importlib.metadata, json, re, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain

def closure(lines):
    found, rest = set(), [Requirement(line) for line in lines]
    while rest:
        one = rest.pop()
        if plain(one.name) in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(plain(one.name))
        rest += [Requirement(line) for line in importlib.metadata.requires(one.name) or ()]
    return found

folder = sys.argv[1]
allowed = closure(open(folder + "/requirements.txt").read().split())
owners = {m: {plain(d) for d in ds} for m, ds in importlib.metadata.packages_distributions().items()}
for brought in ("pipeline", "mtl_lora"):  # by the model itself
    owners.pop(brought, None)

class OnlyListed:
    # What no requirement brings is not there: found by no finder, as in an environment made from the list.
    def find_spec(self, name, path=None, target=None):
        owner = owners.get(name.split(".")[0])
        if owner and not owner & allowed:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        found = importlib.metadata.MetadataPathFinder.find_distributions(context)
        return [one for one in found if plain(one.name) in allowed]

for name in [n for n in sys.modules if owners.get(n.split(".")[0]) and not owners[n.split(".")[0]] & allowed]:
    del sys.modules[name]
sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, OnlyListed()]
sys.path[:] = [p for p in sys.path if "site-packages" in p or p.startswith(sys.base_prefix)]
for absent in ("ray", "deepspeed", "webdataset", "peft", "jobs"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(absent + " must not be there")
import mlflow, pandas
model = mlflow.pyfunc.load_model(folder)
rows = pandas.DataFrame(json.loads(sys.argv[2]))
print(json.dumps(model.predict(rows).to_dict("records")))
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_model_answers_where_only_its_requirements_can_be_imported(
    packaged: Path, predictor: Path, tmp_path: Path
) -> None:
    rows = input_example(TASKS)
    command = [sys.executable, "-I", "-c", CLEAN, str(packaged), rows.to_json(orient="records")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MTL_LORA_CACHE": str(tmp_path / "none")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = Predictor.load(predictor, "cpu").predict(rows).to_dict("records")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["label_word"] == theirs["label_word"]
        # The base travels in bfloat16, in which it was converted: the numbers are the same.
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
