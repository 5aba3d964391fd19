"""What KubeRay's definitions take of the kinds that are written here, as JSON schemas: the keys of 1.6.2 that a
deployment may use, and the one of 1.7.0. Pods in them are Kubernetes' own, and checked as such."""

from __future__ import annotations

from typing import Any

VERSIONS = ("1.6.2", "1.7.0")
_TEXT, _FLAG, _TEXTS = (
    {"type": "string"},
    {"type": "boolean"},
    {"type": "object", "additionalProperties": {"type": "string"}},
)
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_POD = {"type": "object", "required": ["spec"]}


def _closed(required: list[str], **keys: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": keys}


_GROUP = {"rayStartParams": _TEXTS, "template": _POD}
_CLUSTER = _closed(
    ["headGroupSpec"],
    rayVersion=_TEXT,
    suspend=_FLAG,
    enableInTreeAutoscaling=_FLAG,
    authOptions=_closed(["mode"], mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_closed(["template"], **_GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": _closed(
            ["groupName", "maxReplicas", "minReplicas", "template"],
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            **_GROUP,
        ),
    },
)
_JOB = _closed(
    [],
    activeDeadlineSeconds={**_COUNT, "minimum": 1},
    backoffLimit=_COUNT,
    entrypoint=_TEXT,
    rayClusterSpec=_CLUSTER,
    shutdownAfterJobFinishes=_FLAG,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    suspend=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
)
_CRON = {"schedule": _TEXT, "suspend": _FLAG, "jobTemplate": _JOB}


def schema(kind: str, version: str) -> dict[str, Any]:
    """Return the schema of a kind.

    Args:
        kind: such as ``RayJob``.
        version: one of ``VERSIONS``.
    """
    zone = {"timeZone": {**_TEXT, "minLength": 1}} if version == "1.7.0" else {}
    spec = {
        "RayCluster": _CLUSTER,
        "RayJob": _JOB,
        "RayCronJob": _closed(["schedule", "jobTemplate"], **_CRON, **zone),
        "RayService": _closed([], serveConfigV2=_TEXT, rayClusterConfig=_CLUSTER),
    }[kind]
    return _closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"type": "object"},
        spec=spec,
    )
