"""Answers that a model has written, kept while an evaluation runs: one that is cut off goes on behind them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.contracts import Sample, write_atomic
from pipeline.json_text import parse_json


class ScoredChunk(NamedTuple):
    """What a model answered to some samples that were asked in one call."""

    probabilities: list[np.ndarray]
    """One array of class probabilities a sample, in label order."""
    texts: list[str | None]
    """What it wrote for each; None for a label whose words were scored."""
    states: dict[tuple[str, str], np.ndarray]
    """Task and key → hidden state (H,) in fp32, of the samples for which it was asked."""


class KeptAnswers:
    """A folder of answered chunks, which belongs to one model and one set of samples.

    Args:
        folder: its place; what it holds of other models or samples goes.
        digest: of the model's weights, the samples, and how they are asked.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder, self._own = folder, folder / digest
        if folder.is_dir() and not self._own.is_dir():
            shutil.rmtree(folder)

    def find(self, number: int, samples: Sequence[Sample]) -> ScoredChunk | None:
        """Return the answers to a chunk, None where it is to be asked."""
        path = self._own / f"{number:06d}.json"
        if not path.is_file():
            return None
        found = parse_json(path.read_bytes())
        if found["samples"] != [[sample.task, sample.key] for sample in samples]:
            return None
        states = {(task, key): np.array(state, np.float32) for task, key, state in found["states"]}
        return ScoredChunk([np.array(row) for row in found["probabilities"]], found["texts"], states)

    def keep(self, number: int, samples: Sequence[Sample], chunk: ScoredChunk) -> None:
        """Keep the answers to a chunk, whole or not at all; numbers come back bit for bit."""
        found = {
            "samples": [[sample.task, sample.key] for sample in samples],
            "probabilities": [row.tolist() for row in chunk.probabilities],
            "texts": chunk.texts,
            "states": [[*name, state.tolist()] for name, state in chunk.states.items()],
        }
        write_atomic(self._own / f"{number:06d}.json", json.dumps(found))

    def remove(self) -> None:
        """Delete the folder: its answers stand elsewhere now."""
        shutil.rmtree(self._folder, ignore_errors=True)
