"""What the environment tells Ray and what it tells of it; imports no Ray, for it must stand before Ray is imported."""

from __future__ import annotations

import os

_INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
OWN_CLUSTER = "MTL_LORA_OWN_CLUSTER"
"""Variable of a job whose cluster was started for it alone, and ends with it."""

# The controller asks workers this often whether they live and what they report.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A job that is stopped first saves: the cluster started here waits so long before it kills.
os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "120")


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    return _INSIDE_JOB in os.environ


def address_of(configured: str) -> str:
    """Return the address of the cluster to join, the one configured or else RAY_ADDRESS; empty where there is none."""
    return configured or os.environ.get("RAY_ADDRESS", "")


def is_on_lasting_cluster(configured: str) -> bool:
    """Whether this process can join a cluster that outlives it: that of its job, or one named by an address of Ray's
    own, not by its dashboard's."""
    address = address_of(configured)
    is_named = address not in ("", "local") and not address.startswith("http")
    return OWN_CLUSTER not in os.environ and (inside_job() or is_named)
