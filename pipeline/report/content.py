"""What the page is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.contracts import Comparison, EvaluationReport, PromotionDecision, ShardManifest
from pipeline.evaluation.features import TaskFeatures
from pipeline.report.adapter_view import AdapterView
from pipeline.report.examples import ImagesOf

if TYPE_CHECKING:
    from pipeline.ingestion import DriftReport


@dataclass(frozen=True)
class EvaluatedModel:
    """One model on the test samples."""

    report: EvaluationReport
    """Its metrics."""
    scores: pd.DataFrame | None = None
    """What they were computed from, as :func:`pipeline.evaluation.read_scores` returns it; without it no charts."""


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """Everything that the page shows; a part that is None or empty is left out."""

    run_name: str
    """Heading."""
    manifest: ShardManifest
    """Of the data that was scored: the tasks in their order, and the table of data."""
    candidate: EvaluatedModel
    """The new model."""
    champion: EvaluatedModel | None = None
    """The present champion."""
    base: EvaluatedModel | None = None
    """The untrained model."""
    decision: PromotionDecision | None = None
    """Verdict and reasons, on top of the page and with each task."""
    comparison: Comparison | None = None
    """Paired differences to another model, under the table of tasks."""
    prompts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Task and key → what was asked, of the tasks that :func:`pipeline.report.examples.has_examples` names."""
    images_of: ImagesOf | None = None
    """Gives the images of the samples that are shown."""
    history: Sequence[Mapping[str, Any]] = ()
    """Training log, one row a logged step: ``step``, ``loss``, ``task_loss``, ``learning_rate``, ``tokens_per_s``."""
    adapter: AdapterView | None = None
    """How the tasks share the adapter."""
    features: Mapping[str, TaskFeatures] = field(default_factory=dict)
    """Model (``LoRA``, ``MTL-LoRA``) → task features of the same samples, drawn side by side."""
    features_note: str = ""
    """Said under them."""
    drift: DriftReport | None = None
    """How far the data lies from an earlier window's."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What the model was made from, by name."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's resolved configuration, shown folded."""
