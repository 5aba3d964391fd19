"""The lower layers of an encoder that no adapter stands in: their states are computed once and kept for all runs.

Nothing below the first adapted layer changes in training, so what reaches that layer is the same in every step, run and
arm. Each distinct row's states are kept in a table; a row's tokens become places in it, the embedding becomes a look-up
and the lower layers go. What is computed above is bit for bit what the whole model computes from these states.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.contracts import Sample, TaskSpec, write_atomic
from pipeline.errors import InputError
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.head_scoring import _packed_states
from pipeline.modeling.packed_attention import NAME
from pipeline.modeling.packing import HeadExample, micro_batches
from pipeline.stream import load_manifest, read_split
from pipeline.study.loaded import loaded_base
from pipeline.training.engine import device

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob

_TOKENS = 4096
"""At once through the lower layers."""
Row = tuple[tuple[int, ...], tuple[int, ...]]


class StateTable(nn.Module):
    """Stands for the embedding and the lower layers: gives the states (1, M, H) of places (1, M)."""

    def __init__(self, states_KH: Tensor) -> None:
        super().__init__()
        self.states_KH = states_KH

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Look states up; positions and segments are in them."""
        return self.states_KH[input_ids]

    def __deepcopy__(self, memo: dict[int, Any]) -> StateTable:
        """Be shared by all copies: nothing writes to it."""
        return self


class KeptRows(SampleEncoder):
    """Gives samples' rows as places in the table.

    Args:
        encoder: makes the rows.
        first: place of each row's first token.
    """

    def __init__(self, encoder: Any, first: dict[Row, int]) -> None:
        super().__init__(encoder.tokenizer, encoder.specs, encoder.max_length)
        self.encoder, self._first = encoder, first

    def share_heads(self) -> None:
        """See :meth:`pipeline.modeling.head_encoding.HeadEncoder.share_heads`."""
        self.encoder.share_heads()

    def encode(self, samples: Sequence[Sample]) -> list[HeadExample]:
        """Return examples whose tokens are places.

        Raises:
            InputError: a row is none of those that the table was made of.
        """
        examples = []
        for example in self.encoder.encode(samples):
            places = []
            for row in zip(example.rows, example.token_types, strict=True):
                if row not in self._first:
                    raise InputError(f"a row must be of the shards that were read, {example.name} is not; prepare anew")
                start = self._first[row]
                places.append(tuple(range(start, start + len(row[0]))))
            examples.append(replace(example, rows=tuple(places)))
        return examples


def without_frozen_part(job: TrainingJob, base: Any, frozen_layers: int, kept: Path) -> tuple[nn.Module, SampleEncoder]:
    """Return an encoder's upper layers on the kept states of a job's samples, and what makes rows of the samples.

    Args:
        job: whose shards hold all samples that will be asked.
        base: the whole model; not changed.
        frozen_layers: how many lower layers are computed once.
        kept: folder in which the states stay for other processes.

    Raises:
        InputError: the base is no encoder with its layers in ``encoder.layer``, in packed rows, or has too few.
    """
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if layers is None or not hasattr(base, "embeddings") or base.config._attn_implementation != NAME:
        raise InputError(
            "frozen_layers needs an encoder of BERT's make in packed rows, whose layers stand in encoder.layer, got "
            f"{type(base).__name__}; set frozen_layers: 0"
        )
    if not 0 < frozen_layers < len(layers):
        raise InputError(f"frozen_layers must leave a layer of {len(layers)}, got {frozen_layers}; lower it")
    told = (job.base.model_dump_json(), tuple(task.model_dump_json() for task in job.tasks))
    table, first = _table(str(job.manifest_path), *told, frozen_layers, kept)
    upper = copy.copy(base)
    upper._modules = dict(base._modules)
    upper.encoder = copy.copy(base.encoder)
    upper.encoder._modules = {**base.encoder._modules, "layer": nn.ModuleList(layers[frozen_layers:])}
    upper._modules["encoder"], upper._modules["embeddings"] = upper.encoder, StateTable(table)
    return copy.deepcopy(upper), KeptRows(sample_encoder(job.base, job.tasks), first)


@functools.lru_cache(maxsize=8)
def _table(
    manifest: str, base: str, tasks: tuple[str, ...], frozen_layers: int, kept: Path
) -> tuple[Tensor, dict[Row, int]]:
    """Return the states of every row of the shards, (K, H), and each row's first place."""
    config = BaseModelConfig.model_validate_json(base)
    encoder = sample_encoder(config, [TaskSpec.model_validate_json(task) for task in tasks])
    found, digest, _ = load_manifest(manifest)
    rows: dict[Row, None] = {}
    for split in sorted({shard.split for shard in found.shards}):
        examples: Any = encoder.encode(list(read_split(manifest, split)))
        rows |= {row: None for e in examples for row in zip(e.rows, e.token_types, strict=True)}
    first, total = {}, 0
    for row in rows:
        first[row], total = total, total + len(row[0])
    told = json.dumps([digest, base, tasks, frozen_layers])
    path = kept / f"states-{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        states = _states(loaded_base(config), encoder, list(rows), frozen_layers)
        kept.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"states": states}))
    return load_file(path, str(device()))["states"], first


@torch.inference_mode()
def _states(base: Any, encoder: SampleEncoder, rows: list[Row], frozen_layers: int) -> Tensor:
    lower = copy.copy(base)
    lower._modules = dict(base._modules)
    lower._modules["encoder"] = copy.copy(base.encoder)
    lower.encoder._modules = {**base.encoder._modules, "layer": nn.ModuleList(base.encoder.layer[:frozen_layers])}
    examples = [HeadExample("", 0, (ids,), (types,), (0,), (1.0,), 1.0) for ids, types in rows]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for part in micro_batches(examples, _TOKENS):
        batch = encoder.collate([examples[i] for i in part]).to(base.device)
        states_MH = _packed_states(lower, batch, base.row_reading, contextlib.nullcontext(), None)
        for i, states in zip(part, states_MH.split([len(rows[i][0]) for i in part]), strict=True):
            found[i] = states.cpu()
    return torch.cat(found)
