"""``task.json`` in an exported task's folder: how the task is asked, and on which base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field

from mtl_lora import MTLLoRAError
from mtl_lora.hashes import check_hashes
from mtl_lora.serving import ServedBase
from pipeline.contracts import Contract, TaskKind, TaskName, TaskSpec
from pipeline.errors import InputError
from pipeline.generation import GenerationConfig
from pipeline.modeling.architecture import is_encoder
from pipeline.modeling.base_model import BaseModelConfig, base_settings
from pipeline.modeling.head_encoding import segment_templates

TASK_FILE = "task.json"


class ExportedBase(Contract):
    """The frozen model under an exported task."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """On a hub, or of the folder that it was loaded from."""
    fingerprint: str | None
    """sha256 of ``mtl_lora.files.fingerprint`` over its tensors: the same in every type that it is loaded in."""
    num_layers: int | None = None
    """Only its first layers stand under the adapter; None for all."""
    quantization: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """How its linear layers were held in training, ``4bit`` or ``8bit``; None: in its own precision."""
    note: str = ""
    """Why the model of that name would answer otherwise; empty where it would not."""


class ExportedTask(Contract):
    """``task.json``: all that an engine needs to ask an exported task as it was trained.

    The prompt is ``template`` with the record's fields in braces filled in, tokenised as one text. A class's score is
    the log-likelihood of its label word's tokens right after the prompt's; the probabilities are the softmax over the
    classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: TaskName
    kind: TaskKind
    template: str
    """Prompt; ``{field}`` stands for a field of the record, ``{{`` for a brace. The answer follows directly."""
    label_words: tuple[str, ...]
    """One word a class, with its leading space. Empty for ``choice``: the record brings them, and each is asked with a
    space before it."""
    label_tokens: tuple[tuple[int, ...], ...]
    """Token ids of each label word behind the template, under the base's tokenizer; empty for ``choice``."""
    label_values: tuple[float, ...]
    """For ``ordinal``: the number each class stands for; the answer is the expected value. For ``regression``: two
    numbers, which the head's -1 and 1 stand for."""
    choices_field: str | None
    """For ``choice``: field of the record that lists its answers."""
    length_normalized: bool
    """A class's log-likelihood is divided by its number of tokens."""
    max_length: int
    """Most tokens of prompt and label word but its last; a longer prompt loses the end of its longest field, never a
    part of the template."""
    segments: tuple[str, ...] = ()
    """Of an encoder: the templates of the one or two texts of a row; for ``choice`` the answer is one text more."""
    labels: tuple[str, ...] = ()
    """Of an encoder: names of the classes where label words do not name them."""
    pooling: Literal["first", "mean"] | None = None
    """Of an encoder: the state that its head scores, the first token's or the mean; None where label words answer."""
    answer_by: Literal["scores", "generation"] = Field(default="scores", exclude_if=lambda value: value == "scores")
    """``generation``: the answer is the text that the model writes after the prompt, up to its end token; of a label,
    its word. Label tokens are then empty."""
    generation: GenerationConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """How the answer is written, where it is."""
    base: ExportedBase

    @classmethod
    def of(
        cls, task: TaskSpec, config: BaseModelConfig, base: ServedBase, label_tokens: Sequence[tuple[int, ...]]
    ) -> Self:
        """Return what an exported task says of itself.

        Args:
            task: as it was trained.
            config: of the model under it.
            base: the same model as other machines know it.
            label_tokens: of each label word; none for ``choice``.
        """
        is_choice = task.kind == "choice"
        has_head = is_encoder(base_settings(config))
        return cls(
            name=task.name,
            kind=task.kind,
            template=task.template,
            label_words=task.label_words,
            label_tokens=tuple(label_tokens),
            label_values=task.label_values,
            choices_field=task.choices_field if is_choice else None,
            length_normalized=task.length_normalized,
            max_length=config.max_length,
            segments=segment_templates(task) if has_head else (),
            labels=task.labels,
            answer_by=task.answer_by,
            generation=task.generation if task.is_written else None,
            pooling=config.pooling if has_head else None,
            base=ExportedBase(
                name=base.name,
                fingerprint=base.fingerprint,
                num_layers=config.num_layers,
                quantization=config.quantization,
                note=base.note,
            ),
        )

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read one; the folder's list of hashes tells damage.

        Args:
            path: of ``task.json``, or of the exported task's folder.

        Raises:
            InputError: the file is missing, damaged, or breaks the contract.
        """
        file = Path(path) / TASK_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(
                f"an exported task must hold {TASK_FILE}, found none at {file}; earlier exports have none, export anew"
            )
        try:
            check_hashes(file.parent, file.name)
        except MTLLoRAError as error:
            raise InputError(str(error)) from error
        return super().read(file)

    @property
    def text(self) -> str:
        """What the file holds."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"

    @property
    def spec(self) -> TaskSpec:
        """The task as the pipeline's encoder takes it."""
        return TaskSpec(
            name=self.name,
            kind=self.kind,
            template=self.template,
            segments=self.segments,
            label_words=self.label_words,
            labels=self.labels,
            label_values=self.label_values,
            choices_field=self.choices_field or "choices",
            length_normalized=self.length_normalized,
            answer_by=self.answer_by,
            generation=self.generation or GenerationConfig(),
        )
