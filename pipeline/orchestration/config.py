"""Which cluster runs the job."""

from __future__ import annotations

from pydantic import Field

from pipeline.settings import Settings


class RayConfig(Settings):
    """Which cluster runs the job."""

    address: str = ""
    """Cluster to join (``http://head:8265``, ``auto`` or ``head:6379``); empty: RAY_ADDRESS, else a local cluster, for
    which ``prepare`` alone must be told ``local``."""
    object_store_mb: int = Field(default=200, ge=80)
    """Object store of a local cluster, in MiB; samples and scores are small."""
