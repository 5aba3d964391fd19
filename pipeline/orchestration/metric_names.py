"""The metrics that training, promotion and the loop export through Ray: names, kinds, tags. Imports no Ray.

Ray puts ``ray_`` before each name, and ``_total`` behind a counter's, where Prometheus reads them. The server's own
stand in :mod:`pipeline.serving.server`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricName:
    """One metric.

    Args:
        name: as it is given to Ray.
        kind: what may happen to its value.
        tags: that each of its series has.
        description: what it counts, with the unit.
    """

    name: str
    kind: Literal["gauge", "counter"]
    tags: tuple[str, ...]
    description: str

    @property
    def exported(self) -> str:
        """Its name where Prometheus reads it."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


STEP = MetricName("mtl_lora_training_step", "gauge", ("run",), "Last step of the run.")
STEPS = MetricName("mtl_lora_training_steps", "gauge", ("run",), "Steps that the run will have.")
SAMPLES = MetricName("mtl_lora_training_samples", "gauge", ("run",), "Samples that the run has learnt from.")
TOKENS = MetricName("mtl_lora_training_tokens_per_second", "gauge", ("run",), "Tokens a second, all ranks together.")
LOSS = MetricName("mtl_lora_training_loss", "gauge", ("run",), "Mean loss since the row before.")
TASK_LOSS = MetricName("mtl_lora_training_task_loss", "gauge", ("run", "task"), "Mean loss of a task.")
WAIT = MetricName("mtl_lora_training_data_wait_share", "gauge", ("run",), "Share of the time spent waiting for data.")
RESTARTS = MetricName("mtl_lora_training_restarts", "gauge", ("run",), "Starts of the run's ranks after the first.")
PROGRESS = MetricName(
    "mtl_lora_training_progress_time_seconds", "gauge", ("run",), "When the last row was measured, since 1970."
)
VERDICTS = MetricName("mtl_lora_verdicts", "counter", ("model", "verdict"), "Verdicts of the gates.")
RETRAININGS = MetricName("mtl_lora_retrainings", "counter", ("model", "outcome"), "Retrainings of the loop that ended.")
CHAMPION_SINCE = MetricName(
    "mtl_lora_champion_since_seconds", "gauge", ("model",), "When the champion became champion, since 1970."
)
OF_TRAINING = (STEP, STEPS, SAMPLES, TOKENS, LOSS, TASK_LOSS, WAIT, RESTARTS, PROGRESS)
OF_MODELS = (VERDICTS, RETRAININGS, CHAMPION_SINCE)
