"""What the server is told, and what its requests and answers look like: no Ray, no model."""

from __future__ import annotations

import os
import re
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.settings import Settings


class ShadowConfig(Settings):
    """A challenger that scores live requests and never answers them."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Of the requests; its scores and the champion's are logged."""


class CanaryConfig(Settings):
    """A challenger that answers live requests, and when it is taken back."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Of the keys: a request brings its ``key``, else it is its own; a key is answered by one version."""
    min_requests: int = Field(default=200, ge=1)
    """Of each version, before they are compared."""
    max_error_share: float = Field(default=0.01, ge=0, le=1)
    """How much larger the share of requests at which it fails may be than the champion's; each is answered by the
    champion instead."""
    max_latency_ratio: float = Field(default=1.5, ge=1)
    """How much longer its answers may take than the champion's, at the 95th percentile."""
    score_ratio: tuple[float, float] = (0.67, 1.5)
    """Limits of its mean score over the champion's in each binary task: beyond them, and beyond chance, it is taken
    back. What labels say of its calibration is judged where they come (``feedback``)."""


class LogConfig(Settings):
    """Where scores of live requests are kept."""

    url: str = ""
    """Folder, local or ``s3://``, that all replicas reach; it holds no text of the requests."""
    max_mib: int = Field(default=1024, ge=1)
    """Size from which on the oldest files are removed."""
    flush_s: float = Field(default=15.0, gt=0)
    """Longest time that a score waits to be written."""


class ServerConfig(Settings):
    """What is served, and within which limits."""

    model: str
    """``models:/NAME@champion`` follows the alias; ``models:/NAME/NUMBER`` and a folder stay."""
    tracking_uri: str = ""
    """Registry of the model; empty for the one in ``MLFLOW_TRACKING_URI`` of each replica's environment."""
    replicas: int = Field(default=1, ge=1)
    """Processes that hold the model; a GPU each where the cluster has as many."""
    batch_tokens: int = Field(default=2048, ge=1)
    """About so many tokens are answered together."""
    max_rows: int = Field(default=256, ge=1)
    """Most rows of a request."""
    max_bytes: int = Field(default=1 << 20, ge=1)
    """Longest body of a request."""
    max_waiting_rows: int = Field(default=1024, ge=1)
    """Rows that may wait in a replica; further requests are refused with 429."""
    timeout_s: float = Field(default=10.0, gt=0)
    """A request that is not answered by then ends with 503."""
    poll_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks at the registry."""
    needs_token: bool = False
    """Refuse to start where the environment has no token, and to answer whoever does not bring it."""

    shadow: ShadowConfig = ShadowConfig()
    """Live requests that the challenger scores, too."""
    canary: CanaryConfig = CanaryConfig()
    """Live requests that the challenger answers."""
    log: LogConfig = LogConfig()
    """Where the scores of both are kept."""
    drift_against: str = ""
    """Shards of the training, or their folder's URL: live texts are held against their profile; empty for no look."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.has_challenger and not (self.log.url and self.model.startswith("models:/")):
            raise ValueError(
                "shadow and canary need a registered model, whose challenger they try, and a log of both scores, got "
                f"model {self.model!r} and log {self.log.url!r}; name models:/NAME@champion and a folder"
            )
        return self

    @property
    def has_challenger(self) -> bool:
        """Whether a challenger sees traffic."""
        return self.shadow.share > 0 or self.canary.share > 0

    @property
    def challenger(self) -> str:
        """The challenger's reference."""
        name = re.split("[@/]", self.model.removeprefix("models:/"))[0]
        return f"models:/{name}@challenger"

    @property
    def registry(self) -> str:
        """The registry's address, wherever it is told."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")


class ScoreRequest(Settings):
    """Body of ``POST /v1/score``."""

    rows: list[dict[str, Any]] = Field(min_length=1)
    """Each with its ``task`` and the fields that the task's template names."""
    key: str | None = Field(default=None, max_length=256)
    """Whoever asks, such as a user: one key is answered by one version. The request's id where none is given."""


class ScoredRow(Settings):
    """One answer."""

    task: str
    score: float | None
    """Binary: P(class 1); ordinal: expected value; else the probability of the predicted class. Null for a text."""
    label: int
    """Predicted class; -1 where what the model wrote is the word of none."""
    label_word: str
    probabilities: list[float]
    generated_text: str | None = None
    """What the model wrote; there where a task's answers are written."""


class ScoreResponse(Settings):
    """Answer of ``POST /v1/score``: one version has answered all rows, in their order."""

    request: str
    """Its id, as in the header ``X-Request-Id``: labels that come later name it."""
    model: str
    answers: list[ScoredRow]
