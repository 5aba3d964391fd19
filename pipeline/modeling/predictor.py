"""A trained adapter with all that is needed to answer: base model, tasks, prompts.

The folder holds ``adapter_model.safetensors`` and the adapter's configuration beside ``predictor.json``, and the
hashes of all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from mtl_lora import MTLLoRAError
from mtl_lora.hashes import check_hashes, write_hashes
from pipeline.answer import GENERATED, Answer, answer_columns
from pipeline.contracts import Contract, Sample, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.label_names import THRESHOLD
from pipeline.modeling.adapter import load_adapter
from pipeline.modeling.answering import class_scorer, sample_encoder, untrained_scorer
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.scoring import Scorer
from pipeline.record import Rejected, asked, fields_found

PREDICTOR_FILE = "predictor.json"
NO_CLASS = -1
"""``label`` of an answer that is no one class: of a multilabel or a regression task, or a text that names none."""


class PredictorSpec(Contract):
    """``predictor.json``: what an adapter was trained for and on."""

    schema_version: Literal[1] = 1
    tasks: tuple[TaskSpec, ...]
    base: BaseModelConfig
    reading: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Keys of ``data`` by which its records were read: dialects, encodings, columns."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read it; the adapter's list of hashes, beside it, tells damage.

        Raises:
            InputError: the file is missing, damaged, or breaks the contract.
        """
        try:
            check_hashes(Path(path).parent, Path(path).name)
        except MTLLoRAError as error:
            raise InputError(str(error)) from error
        return super().read(path)

    def write(self, path: str | Path) -> None:
        """Write it, and its hash into the list beside it."""
        super().write(path)
        write_hashes(Path(path).parent, Path(path).name)


class Predictor:
    """Answers rows of any of its tasks, mixed in one call.

    Args:
        spec: tasks and base model.
        scorer: computes class probabilities.
    """

    def __init__(self, spec: PredictorSpec, scorer: Scorer) -> None:
        self.spec, self.scorer = spec, scorer
        self._specs = {task.name: task for task in spec.tasks}
        self._text_fields = {task.name: task.text_fields for task in spec.tasks}
        self.columns = answer_columns(spec.tasks)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: torch.device | str | None = None,
        batch_tokens: int = 2048,
        base: Path | str | None = None,
        asking: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ) -> Predictor:
        """Load a predictor from its folder.

        Args:
            folder: see the module.
            device: CUDA where there is one by default.
            batch_tokens: most tokens that go through the model at once.
            base: folder with the base model, where it lies elsewhere than ``predictor.json`` says.
            asking: see :func:`pipeline.modeling.base_model.load_base`.

        Raises:
            InputError: the folder lacks a file, or the adapter belongs to another base.
        """
        spec = PredictorSpec.read(Path(folder) / PREDICTOR_FILE)
        if base is not None:
            spec = spec.model_copy(update={"base": spec.base.model_copy(update={"base": str(base)})})
        model = load_base(spec.base, device or default_device(), asking)
        adapted = load_adapter(model, Path(folder), [task.name for task in spec.tasks])
        return cls(spec, Scorer(class_scorer(adapted), sample_encoder(spec.base, spec.tasks), batch_tokens))

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Answer rows.

        Args:
            frame: a ``task`` column and the fields that the tasks' templates name (``choices`` for choice tasks), in
                any form that ingestion takes; an image as bytes, or their base64.

        Returns:
            A frame with the same index: ``task``; ``score`` (binary: P(class 1); ordinal: expected value; else the
            probability of the predicted class); ``label`` (predicted class index); ``label_word``; ``probabilities``.
            Multilabel: ``score`` is the largest probability, ``label_word`` names the classes of at least 0.5, with
            commas between. Regression: ``score`` is the number, and so is the one of ``probabilities``. Both have -1 as
            ``label``.
            Where a task's answers are written, ``generated_text`` too, what the model wrote, None for other tasks; the
            label is then -1 where the text is the word of no class, and a free text has no score (NaN).

        Raises:
            InputError: the column ``task`` or a field is missing, a task is unknown, a column is there twice, or a
                value is none that ingestion would take.
        """
        if double := sorted({str(name) for name in frame.columns[frame.columns.duplicated()]}):
            raise InputError(f"a table must have each column once, got {double} more than once; rename one")
        if "task" not in frame.columns:
            raise InputError(f"a row must name its task in a column 'task', got columns {list(frame.columns)}; add it")
        samples = self.samples(frame.to_dict("records"))
        found = pd.DataFrame(self.answer(samples), index=frame.index, columns=list(self.columns))
        return found.astype({"score": "float64"})

    def samples(self, rows: Sequence[Mapping[Any, Any]]) -> list[Sample]:
        """Return what the model is asked by rows, each with its ``task`` and the fields that it names.

        Raises:
            InputError: as :meth:`predict` does.
        """
        return [self._sample(str(i), row) for i, row in enumerate(rows)]

    def _sample(self, key: str, row: Mapping[Any, Any]) -> Sample:
        if "task" not in row:
            raise InputError(f"row {key} must name its task in a field 'task', got {list(row)[:20]}; add it")
        name = str(row["task"])
        if name not in self._specs:
            raise InputError(f"task must be one of the model's, got {name!r}{did_you_mean(name, self._specs)}")
        spec = self._specs[name]
        try:
            return asked(row, spec, self._text_fields[name], key)
        except Rejected as reason:
            wanted = [*self._text_fields[name], *([spec.choices_field] if spec.kind == "choice" else [])]
            wanted += [spec.image_field] if spec.image_field else []
            raise InputError(
                f"row {key} of task {name!r} must hold what the task asks for ({wanted}): {reason}; "
                f"{fields_found([str(field) for field in row], wanted)}"
            ) from None

    def answer(self, samples: Sequence[Sample]) -> list[Answer]:
        """Return task, score, label, label word and probabilities of each sample, as :meth:`predict` does, and what
        was written where the model writes; a free text's score is None.

        Raises:
            InputError: a prompt cannot be cut to the model's length.
        """
        found = self.scorer.replies(samples)
        if GENERATED not in self.columns:
            return [self._answer(sample, reply.probabilities) for sample, reply in zip(samples, found, strict=True)]
        return [(*self._answer(s, reply.probabilities), reply.text) for s, reply in zip(samples, found, strict=True)]

    def explain(self, samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
        """Return what :meth:`answer` does, and each sample's log-likelihoods of its label words, in label order.

        They are natural logarithms, summed over a word's tokens or their mean where the task is length-normalised; with
        heads the log-probabilities; empty where the answer is written. Errors are those of :meth:`answer`.
        """
        rows = []
        for sample, (reply, known) in zip(samples, self.scorer.explained(samples), strict=True):
            written = (reply.text,) if GENERATED in self.columns else ()
            rows.append((*self._answer(sample, reply.probabilities), *written, known.tolist()))
        return rows

    def _answer(self, sample: Sample, probabilities: np.ndarray) -> tuple[str, float | None, int, str, list[float]]:
        spec = self._specs[sample.task]
        if spec.is_written and not probabilities.any():
            return sample.task, 0.0 if len(probabilities) else None, NO_CLASS, "", probabilities.tolist()
        label = int(probabilities.argmax())
        if spec.kind == "regression":
            number = float(probabilities[0])
            return sample.task, number, NO_CLASS, f"{number:g}", probabilities.tolist()
        if spec.kind == "multilabel":
            found = [name.strip() for name, p in zip(spec.class_names, probabilities, strict=True) if p >= THRESHOLD]
            return sample.task, float(probabilities.max()), NO_CLASS, ", ".join(found), probabilities.tolist()
        if spec.kind == "binary":
            score = float(probabilities[1])
        elif spec.kind == "ordinal":
            score = float(probabilities @ np.asarray(spec.label_values))
        else:
            score = float(probabilities[label])
        words = sample.choices or spec.class_names
        return sample.task, score, label, words[label].strip(), probabilities.tolist()


def default_device() -> torch.device:
    """Return CUDA's current device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_scorers(
    folder: Path, batch_tokens: int, asking: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Scorer]:
    """Return two scorers on one model in memory: ``trained``, as the folder has it, and ``base``, untrained."""
    predictor = Predictor.load(folder, batch_tokens=batch_tokens, asking=asking)
    trained = predictor.scorer
    base = untrained_scorer(trained.model.adapted, predictor.spec.tasks)
    return {"trained": trained, "base": Scorer(base, trained.encoder, batch_tokens)}
