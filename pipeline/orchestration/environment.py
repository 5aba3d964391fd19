"""What the environment tells Ray and what it tells of it; imports no Ray, for it must stand before Ray is imported."""

from __future__ import annotations

import os
from typing import Any

from pipeline.json_text import parse_json
from pipeline.log_lines import variables

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


def submission_id() -> str | None:
    """Return the id under which the job was submitted that this process drives; None where it drives none."""
    found: str | None = (_of_job().get("metadata") or {}).get("job_submission_id")
    return found


def _of_job() -> dict[str, Any]:
    found: dict[str, Any] = parse_json(os.environ.get(_INSIDE_JOB, "{}"))
    return found


def of_workers() -> dict[str, str]:
    """Return the variables that workers get from this process: those of its log lines, but for what its job brings.

    Ray refuses a variable that a job and its driver both name.
    """
    brought = (_of_job().get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables().items() if name not in brought}


def address_of(configured: str) -> str:
    """Return the address of the cluster to join, the one configured or else RAY_ADDRESS; empty where there is none."""
    return configured or os.environ.get("RAY_ADDRESS", "")


def is_on_lasting_cluster(configured: str) -> bool:
    """Whether this process can join a cluster that outlives it: that of its job, or one named by an address of Ray's
    own, not by its dashboard's."""
    address = address_of(configured)
    is_named = address not in ("", "local") and not address.startswith("http")
    return OWN_CLUSTER not in os.environ and (inside_job() or is_named)
