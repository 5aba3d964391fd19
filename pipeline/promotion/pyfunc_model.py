"""The registered model as MLflow runs it: this file is the model's code, its weights are safetensors, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from pipeline.json_text import parse_json


class MultiTaskPredictor(PythonModel):
    """Answers a frame of mixed tasks: a ``task`` column and the texts that the tasks' templates name."""

    def load_context(self, context: Any) -> None:
        """Load base model and adapter from the version's own files.

        Raises:
            InputError: a file is not the one that was registered; it is named.
        """
        from pipeline.modeling.predictor import Predictor
        from pipeline.promotion.integrity import check_files

        for name, expected in parse_json(Path(context.artifacts["digests"]).read_text()).items():
            check_files(Path(context.artifacts[name]), expected, f"the registered model's {name}")
        self._predictor = Predictor.load(context.artifacts["predictor"], base=context.artifacts.get("base"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return ``task``, ``score``, ``label``, ``label_word`` and ``probabilities`` a row, and ``generated_text``
        where a task's answers are written."""
        return self._predictor.predict(model_input)


mlflow.models.set_model(MultiTaskPredictor())
