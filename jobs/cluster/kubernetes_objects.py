"""The parts of a deployment that Kubernetes itself knows: pods, accounts, storage, network, disruption budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABELS = {"app.kubernetes.io/part-of": "mtl-lora"}
"""Of everything that belongs to the product; ``app.kubernetes.io/name`` is KubeRay's own on its pods and services."""
RUN_FILE = "run.yaml"
"""Name of the configuration in its ConfigMap."""
RUN_ROOT = "/app/runs"
"""Folder of all runs in the containers: on the storage that they share, or a container's own of runs in a bucket."""
_COMPONENT = "app.kubernetes.io/component"
_OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
_USER = 1000


def pod(
    name: str,
    image: str,
    command: Sequence[str] | None,
    cpu: str,
    memory: int,
    *,
    gpus: int = 0,
    component: str = "submitter",
    shared_memory: int = 0,
    runs: dict[str, Any] | None = None,
    mounts: Sequence[dict[str, Any]] = (),
    env: Sequence[dict[str, Any]] = (),
    secrets: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the template of a pod with the fewest rights it can do with: no root, no way to become it, nothing of the
    image can be written, no token of the cluster.

    Args:
        name: of its container.
        image: that it runs.
        command: None: KubeRay's.
        cpu: requested; CPUs are not limited, since a limit only makes them wait.
        memory: bytes, requested and the limit.
        gpus: devices.
        component: what it is, by which the network's rules and the disruption budgets find it.
        shared_memory: bytes of ``/dev/shm``, where Ray keeps objects; they count as the container's memory.
        runs: the volume of the folder of runs, where it has that and the configuration.
        mounts: further ones.
        env: variables, none of them secret.
        secrets: names of Secrets whose keys become variables.
    """
    volumes: list[dict[str, Any]] = [_scratch("tmp", "20Gi"), _scratch("home", "20Gi")]
    places: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": "/home/mtl"}]
    if shared_memory:
        size = f"{-(-shared_memory // 2**20)}Mi"
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        places.append({"name": "shm", "mountPath": "/dev/shm"})
    if runs is not None:
        volumes.append({"name": "config", "configMap": {"name": "mtl-lora-run"}})
        volumes.append({"name": "runs", **runs})
        places.append({"name": "config", "mountPath": "/config", "readOnly": True})
        places.append({"name": "runs", "mountPath": RUN_ROOT})
    whole = f"{memory // 2**20}Mi"
    devices = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "resources": {
            "requests": {"cpu": cpu, "memory": whole, **devices},
            "limits": {"memory": whole, **devices},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*places, *mounts],
    }
    if command is not None:
        container["command"] = list(command)
    if env:
        container["env"] = list(env)
    if secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": {**LABELS, _COMPONENT: component}}, "spec": spec}


def _scratch(name: str, size: str) -> dict[str, Any]:
    return {"name": name, "emptyDir": {"sizeLimit": size}}


def of_name(variable: str, path: str) -> dict[str, Any]:
    """Return a variable that holds a field of the pod itself."""
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def account() -> list[dict[str, Any]]:
    """Return the account of the CronJob's pod, which may make RayJobs and look at them, and nothing else."""
    name = {"name": "mtl-lora-submitter", "labels": LABELS}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name["name"]}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": name, "automountServiceAccountToken": False},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": name,
            "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": name,
            "subjects": [{"kind": "ServiceAccount", "name": name["name"]}],
            "roleRef": role,
        },
    ]


SHARED_RUNS = {"persistentVolumeClaim": {"claimName": "mtl-lora-runs"}}
"""Volume of the folder of runs where all nodes share one."""


def storage(size: int) -> dict[str, Any]:
    """Return the claim of the folder of runs, which all nodes read and write."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": SHARED_RUNS["persistentVolumeClaim"]["claimName"], "labels": LABELS},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": f"{size // 2**30}Gi"}},
        },
    }


def working_copies(size: int) -> dict[str, Any]:
    """Return the volume of a container's working copies of runs in a bucket; ``MTL_LORA_CACHE`` names its folder."""
    return {"emptyDir": {"sizeLimit": f"{size // 2**30}Gi"}}


def network() -> list[dict[str, Any]]:
    """Return who may talk to whom: nodes to each other, the operator to the dashboard, named clients to the scores; and
    out to names, HTTPS, the API and MLflow's port. Anything else is dropped; a policy of your own adds to it."""
    own = {"podSelector": {"matchLabels": LABELS}}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": _OPERATOR}}
    clients = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"mtl-lora/may-score": "true"}}}
    names = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    outside = [_port(443), _port(6443), _port(5000)]
    return [
        _policy(
            "mtl-lora",
            LABELS,
            ingress=[{"from": [own]}, {"from": [operator], "ports": [_port(8265), _port(8000)]}],
            egress=[{"to": [own]}, {"ports": names}, {"ports": outside}],
        ),
        _policy(
            "mtl-lora-serve",
            {**LABELS, _COMPONENT: "replicas"},
            ingress=[{"from": [clients], "ports": [_port(8000)]}],
        ),
    ]


def _port(number: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": number}


def _policy(name: str, of: dict[str, str], ingress: list[Any], egress: list[Any] | None = None) -> dict[str, Any]:
    kinds = ["Ingress"] if egress is None else ["Ingress", "Egress"]
    spec: dict[str, Any] = {"podSelector": {"matchLabels": of}, "policyTypes": kinds, "ingress": ingress}
    if egress is not None:
        spec["egress"] = egress
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": LABELS},
        "spec": spec,
    }


def disruption() -> list[dict[str, Any]]:
    """Return what a drain of nodes may take: no head, whose loss ends a run; one replica at a time. A trainer may go:
    all ranks save, and the run goes on."""
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"mtl-lora-{component}", "labels": LABELS},
            "spec": {"maxUnavailable": most, "selector": {"matchLabels": {**LABELS, _COMPONENT: component}}},
        }
        for component, most in (("head", 0), ("replicas", 1))
    ]
