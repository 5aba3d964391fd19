"""The files of a Kubernetes deployment, written from a configuration and its plan: one spec of the cluster, from which
RayJob, RayCronJob, CronJob, RayCluster and RayService follow, as a kustomize base and an overlay for each kind of node.

KubeRay's keys are those of its 1.6.2; RayCronJob's ``timeZone`` is taken from 1.7.0 on. Ray asks every client for a
token (``authOptions``), which KubeRay makes and gives to the containers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jobs.cluster.kubernetes_objects import (
    LABELS,
    RUN_FILE,
    RUN_ROOT,
    SHARED_RUNS,
    account,
    disruption,
    network,
    of_name,
    pod,
    storage,
    working_copies,
)
from jobs.cluster.sizing import Sizing, sizing
from jobs.config import RunConfig
from jobs.stages.plan import RunPlan
from pipeline.contracts import write_atomic

OVERLAYS = ("cpu", "gpu", "kueue")
"""Kinds of nodes: CPUs alone; a GPU a rank; the same, admitted by a Kueue queue."""
QUEUE = "mtl-lora"
"""Name of the LocalQueue that the overlay kueue is admitted by; whoever runs the cluster makes it."""
RAY_VERSION = "2.60.0"
_NOTE = "# Written by mtl-lora plan --manifests: change the configuration, or lay a kustomization over this folder.\n"
_REPLICAS = 2
_KEPT_S = 3600
"""How long a finished run's cluster stays, for those who look."""
_QUEUED_S = 86400
"""How long a run may be late or wait for nodes."""


def manifests(config: RunConfig, size: Sizing, image: str) -> dict[str, str]:
    """Return the files of a deployment, by their path.

    The configuration is the one that is given, but for its folder of runs, which is the containers' where it is no URL,
    the registry, which their environment names, and the shards, which are each week's. Other paths in it must mean the
    same in all containers. Runs in a bucket need no storage that the nodes share.

    Args:
        config: of the run that is scheduled.
        size: what it needs of the cluster.
        image: that every container runs, with its registry and, best, its digest.
    """
    files = {
        "base/account.yaml": account(),
        "base/network.yaml": network(),
        "base/disruption.yaml": disruption(),
    }
    if size.shares_volume:
        files["base/storage.yaml"] = [storage(size.volume_bytes)]
    files["base/kustomization.yaml"] = [_base([Path(path).name for path in files])]
    for overlay in OVERLAYS:
        job = ray_job(size, overlay, image)
        files[f"{overlay}/rayjob.yaml"] = [job]
        files[f"{overlay}/cronjob.yaml"] = [cron_job(config, size, image)]
        files[f"{overlay}/raycluster.yaml"] = [
            _queued(_of("RayCluster", "mtl-lora", _cluster(size, overlay, image)), overlay)
        ]
        if overlay != "kueue":  # which admits by a label, and a RayCronJob gives its jobs none
            files[f"{overlay}/raycronjob.yaml"] = [ray_cron_job(config, job)]
            files[f"{overlay}/rayservice.yaml"] = [ray_service(config, size, overlay, image)]
        files[f"{overlay}/kustomization.yaml"] = [_overlay()]
    tracking = config.tracking.model_copy(update={"uri": ""})
    there = config.model_copy(update={"tracking": tracking, "manifest": None})
    if size.shares_volume:
        there = there.model_copy(update={"run_root": Path(RUN_ROOT)})
    return {path: _NOTE + _yaml(documents) for path, documents in files.items()} | {f"base/{RUN_FILE}": there.as_yaml()}


def write(config: RunConfig, plan: RunPlan, folder: Path, image: str) -> list[Path]:
    """Write a deployment's files over those that are there, and return their paths.

    Args:
        config: of the run that is scheduled.
        plan: of the same.
        folder: that is written to.
        image: that every container runs.
    """
    files = manifests(config, sizing(config, plan.training), image)
    for path, text in files.items():
        write_atomic(folder / path, text)
    return [folder / path for path in files]


def ray_job(size: Sizing, overlay: str, image: str) -> dict[str, Any]:
    """Return one retraining as a RayJob: its cluster is made for it and removed after it. It is made by ``create``, not
    by ``apply``: each has a name of its own."""
    spec = {
        "entrypoint": f"mtl-lora retrain --config /config/{RUN_FILE}",
        "submissionMode": "HTTPMode",  # the operator asks the dashboard: no further pod, nothing more to secure
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEPT_S,
        "activeDeadlineSeconds": size.deadline_s,
        "backoffLimit": 0,  # the next run goes on where this one stopped
        "rayClusterSpec": _cluster(size, overlay, image),
    }
    job = _of("RayJob", "mtl-lora-retrain", spec)
    job["metadata"] = {"generateName": "mtl-lora-retrain-", "labels": job["metadata"]["labels"]}
    if overlay == "kueue":
        spec["suspend"] = True  # until the queue admits it
    return _queued(job, overlay)


def ray_cron_job(config: RunConfig, job: dict[str, Any]) -> dict[str, Any]:
    """Return the weekly retraining by KubeRay itself: 1.7.0 or newer, with the operator's feature gate RayCronJob."""
    schedule = {"schedule": config.schedule.cron, "timeZone": _zone(config)}
    return _of("RayCronJob", "mtl-lora-retrain", {**schedule, "jobTemplate": job["spec"]})


def cron_job(config: RunConfig, size: Sizing, image: str) -> dict[str, Any]:
    """Return the weekly retraining by a Kubernetes CronJob, for any KubeRay: its pod makes the RayJob of the ConfigMap
    under the name of its own Job and ends as that one does."""
    submitter = pod(
        "submit",
        image,
        ["python", "-m", "jobs.cluster.kubernetes", "/manifests/rayjob.yaml"],
        cpu="100m",
        memory=2**29,
        mounts=[{"name": "manifests", "mountPath": "/manifests", "readOnly": True}],
        env=[
            of_name("JOB_NAME", "metadata.labels['batch.kubernetes.io/job-name']"),
            of_name("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
        ],
    )
    submitter["spec"] |= {
        "serviceAccountName": "mtl-lora-submitter",
        "automountServiceAccountToken": True,
        "restartPolicy": "Never",
        "volumes": [*submitter["spec"]["volumes"], {"name": "manifests", "configMap": {"name": "mtl-lora-rayjob"}}],
    }
    spec = {
        "schedule": config.schedule.cron,
        "timeZone": _zone(config),
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _QUEUED_S,  # a missed run is caught up once within a day
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,  # a Job that goes takes its RayJob along
        "jobTemplate": {
            "spec": {
                "activeDeadlineSeconds": size.deadline_s + _QUEUED_S,
                "backoffLimit": 2,  # a pod that comes again finds its RayJob
                "template": submitter,
            }
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "mtl-lora-retrain", "labels": LABELS},
        "spec": spec,
    }


def ray_service(config: RunConfig, size: Sizing, overlay: str, image: str) -> dict[str, Any]:
    """Return the champion in front of traffic. Its replicas follow the alias by themselves: a promotion or a rollback
    needs nothing here."""
    application = {
        "name": "mtl-lora",
        "import_path": "pipeline.serving.server:application",
        "route_prefix": "/",
        # The registry is MLFLOW_TRACKING_URI of the environment, the token MTL_LORA_SERVE_TOKEN.
        "args": {
            "model": f"models:/{config.promotion.model_name}@champion",
            "replicas": _REPLICAS,
            "needs_token": True,
        },
        "deployments": [
            {
                "name": "scores",
                "ray_actor_options": {"num_cpus": size.cpus} | ({"num_gpus": 1} if overlay == "gpu" else {}),
                "max_replicas_per_node": 1,  # a lost node takes one replica
            }
        ],
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [application],
    }
    secrets = ("mtl-lora-tracking", "mtl-lora-serve")
    cluster = _cluster(size, overlay, image, workers=_REPLICAS, group="replicas", secrets=secrets)
    (group,) = cluster["workerGroupSpecs"]
    group["template"]["spec"]["terminationGracePeriodSeconds"] = 60
    (container,) = group["template"]["spec"]["containers"]
    container["readinessProbe"] = {  # answers when a replica has loaded the model; KubeRay adds the liveness probe
        "httpGet": {"path": "/readyz", "port": 8000},
        "periodSeconds": 5,
        "failureThreshold": 3,
    }
    return _of("RayService", "mtl-lora-serve", {"serveConfigV2": _yaml([serve]), "rayClusterConfig": cluster})


def _cluster(
    size: Sizing,
    overlay: str,
    image: str,
    workers: int | None = None,
    group: str = "trainers",
    secrets: tuple[str, ...] = ("mtl-lora-tracking", "mtl-lora-storage"),
) -> dict[str, Any]:
    """Return the one spec of a cluster."""
    gpus = overlay in ("gpu", "kueue")
    count = size.workers if workers is None else workers
    runs = SHARED_RUNS if size.shares_volume else working_copies(size.volume_bytes)
    common: dict[str, Any] = {"shared_memory": size.object_store_bytes, "runs": runs, "secrets": secrets}
    if not size.shares_volume:
        common["env"] = [{"name": "MTL_LORA_CACHE", "value": RUN_ROOT}]
    head = pod("ray-head", image, None, cpu="2", memory=size.head_bytes, component="head", **common)
    memory = size.gpu_worker_bytes if gpus else size.worker_bytes
    worker = pod(
        "ray-worker", image, None, cpu=str(size.cpus), memory=memory, gpus=int(gpus), component=group, **common
    )
    start = {"object-store-memory": str(size.object_store_bytes)}
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **start}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": group,
                "replicas": count,
                "minReplicas": count,
                "maxReplicas": count,
                "rayStartParams": {"num-cpus": str(size.cpus), **start},
                "template": worker,
            }
        ],
    }


def _of(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": dict(LABELS)},
        "spec": spec,
    }


def _queued(resource: dict[str, Any], overlay: str) -> dict[str, Any]:
    if overlay == "kueue":
        resource["metadata"]["labels"] = {**LABELS, "kueue.x-k8s.io/queue-name": QUEUE}
    return resource


def _zone(config: RunConfig) -> str:
    return "Etc/UTC" if config.schedule.timezone == "UTC" else config.schedule.timezone


def _base(resources: list[str]) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": resources,
        "configMapGenerator": [{"name": "mtl-lora-run", "files": [RUN_FILE]}],
        # RayJobs are made from a text, in which kustomize finds no name to put a hash behind.
        "generatorOptions": {"disableNameSuffixHash": True},
    }


def _overlay() -> dict[str, Any]:
    """Return what ``kubectl apply -k`` takes: the base and the CronJob. A RayJob is created, the others are applied by
    their file."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base", "cronjob.yaml"],
        "configMapGenerator": [{"name": "mtl-lora-rayjob", "files": ["rayjob.yaml"]}],
        "generatorOptions": {"disableNameSuffixHash": True},
    }


class _Plain(yaml.SafeDumper):
    """YAML without anchors: a file is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _text)


def _yaml(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=120, default_flow_style=False)
