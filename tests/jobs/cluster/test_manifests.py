"""A deployment's files are what Kubernetes and KubeRay take, are sized by the plan, and are one spec."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cluster.manifests import OVERLAYS, RAY_VERSION, manifests
from jobs.cluster.sizing import sizing
from jobs.config import RunConfig, load_config
from jobs.run_folder import RunFolder
from jobs.stages.plan import RunPlan
from pipeline.training.plan import TrainingPlan
from tests.jobs.cluster.kuberay import VERSIONS, schema
from tests.jobs.test_cli import ROWS, Run, _configuration, mtl_lora  # noqa: F401 - a fixture

IMAGE = "registry.example/mtl-lora@sha256:" + "0" * 64
GIB = 2**30
PLAN = TrainingPlan(
    parameters=GIB,
    trained_parameters=2**20,
    tokens=10**7,
    computed_share=1.0,
    micro_batches_per_step=1.0,
    largest_micro_batch_tokens=4096,
    seconds=3 * 3600.0,
    validation_seconds=600.0,
    rank_bytes=9 * GIB,
    checkpoint_bytes=2**24,
    kept_bytes=2**26,
    calibration=None,
)
"""Of a base of a thousand million parameters."""
RAY_KINDS = ("RayJob", "RayCronJob", "RayCluster", "RayService")


def _config(*overrides: str) -> RunConfig:
    return load_config(Path("ads_weekly"), ["data.root=s3://bucket/daily", *overrides])


def _rendered(config: RunConfig | None = None, plan: TrainingPlan = PLAN) -> dict[str, str]:
    config = config or _config()
    return manifests(config, sizing(config, plan), IMAGE)


FILES = _rendered()
OBJECTS: dict[str, list[dict[str, Any]]] = {
    path: list(yaml.safe_load_all(text)) for path, text in FILES.items() if not path.endswith("run.yaml")
}


def _object(path: str) -> dict[str, Any]:
    (found,) = OBJECTS[path]
    return found


def _clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    for overlay in OVERLAYS:
        yield f"{overlay}/rayjob", _object(f"{overlay}/rayjob.yaml")["spec"]["rayClusterSpec"]
        yield f"{overlay}/raycluster", _object(f"{overlay}/raycluster.yaml")["spec"]
        if overlay != "kueue":
            yield f"{overlay}/rayservice", _object(f"{overlay}/rayservice.yaml")["spec"]["rayClusterConfig"]


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, cluster in _clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield path, group["template"]
    for overlay in OVERLAYS:
        yield overlay, _object(f"{overlay}/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]


def test_kubernetes_takes_every_object_of_its_own_and_every_pod() -> None:
    known = [o for path in OBJECTS for o in OBJECTS[path] if o["kind"] not in (*RAY_KINDS, "Kustomization")]
    kinds = {"ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget"}
    assert {o["kind"] for o in known} == kinds | {"CronJob"}
    named = {"metadata": {"name": "a"}, "apiVersion": "v1", "kind": "Pod"}
    pods = [{**named, "spec": template["spec"]} for _, template in _pods()]
    for found in known + pods:
        for release in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(found, release, strict=True)


@pytest.mark.parametrize("release", VERSIONS)
def test_kuberay_takes_every_object_of_its_kinds(release: str) -> None:
    objects = [o for path in OBJECTS for o in OBJECTS[path] if o["kind"] in RAY_KINDS]
    assert {o["kind"] for o in objects} == set(RAY_KINDS)
    for found in objects:
        check = jsonschema.Draft202012Validator(schema(found["kind"], release))
        errors = [error.message for error in check.iter_errors(found)]
        expected = found["kind"] == "RayCronJob" and release == "1.6.2"
        assert ("timeZone" in " ".join(errors)) == bool(errors) == expected, errors


def test_each_kind_of_an_overlay_has_the_same_cluster() -> None:
    for overlay in OVERLAYS:
        job = _object(f"{overlay}/rayjob.yaml")["spec"]
        assert _object(f"{overlay}/raycluster.yaml")["spec"] == job["rayClusterSpec"]
        if overlay != "kueue":
            assert _object(f"{overlay}/raycronjob.yaml")["spec"]["jobTemplate"] == job
    assert {cluster["rayVersion"] for _, cluster in _clusters()} == {RAY_VERSION} == {version("ray")}


def test_a_finished_run_leaves_and_a_hung_one_ends() -> None:
    for overlay in OVERLAYS:
        job = _object(f"{overlay}/rayjob.yaml")
        spec = job["spec"]
        assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] >= 2 * (PLAN.seconds + PLAN.validation_seconds)
        assert "name" not in job["metadata"], "a second run on a day is another RayJob"
        cron = _object(f"{overlay}/cronjob.yaml")["spec"]
        assert cron["concurrencyPolicy"] == "Forbid"
        assert cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] > spec["activeDeadlineSeconds"]


def test_every_container_has_the_image_that_was_named_and_no_more_rights_than_it_needs() -> None:
    for path, template in _pods():
        spec = template["spec"]
        (container,) = spec["containers"]
        assert container["image"] == IMAGE, path
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert spec["automountServiceAccountToken"] == (container["name"] == "submit")
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"] and resources["requests"]["cpu"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/home/mtl"}
    (_, role, _) = OBJECTS["base/account.yaml"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]


def _memory(template: dict[str, Any]) -> int:
    (container,) = template["spec"]["containers"]
    return int(container["resources"]["limits"]["memory"].removesuffix("Mi")) * 2**20


def test_containers_hold_what_the_plan_says() -> None:
    config = _config()
    for path, cluster in _clusters():
        head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        assert _memory(head["template"]) > PLAN.parameters * 4
        assert _memory(workers["template"]) > 2 * PLAN.parameters * 4, "a worker compares exports with the model"
        if path.startswith("cpu"):
            assert _memory(workers["template"]) > PLAN.rank_bytes
        assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == config.training.num_workers
        (container,) = workers["template"]["spec"]["containers"]
        assert workers["rayStartParams"]["num-cpus"] == container["resources"]["requests"]["cpu"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == (None if path.startswith("cpu") else "1")


def test_a_larger_plan_or_more_ranks_make_a_larger_cluster() -> None:
    config = _config()
    small, large = sizing(config, PLAN), sizing(config, PLAN.model_copy(update={"rank_bytes": 40 * GIB}))
    assert large.worker_bytes - small.worker_bytes >= 31 * GIB
    base = sizing(config, PLAN.model_copy(update={"parameters": 4 * GIB}))
    assert base.head_bytes - small.head_bytes >= 12 * GIB and base.gpu_worker_bytes > small.gpu_worker_bytes
    slow = sizing(config, PLAN.model_copy(update={"seconds": 48 * 3600.0}))
    assert slow.deadline_s >= 96 * 3600
    ranks = sizing(_config("training.num_workers=4"), PLAN)
    assert (ranks.workers, small.workers) == (4, 2)


def test_the_schedule_is_the_configuration_s() -> None:
    config = _config("schedule.cron=30 4 * * 2", "schedule.timezone=Europe/Paris")
    files = _rendered(config)
    for path in ("cpu/cronjob.yaml", "gpu/raycronjob.yaml"):
        spec = yaml.safe_load(files[path])["spec"]
        assert (spec["schedule"], spec["timeZone"]) == ("30 4 * * 2", "Europe/Paris")


def test_what_is_named_is_there() -> None:
    made = {"mtl-lora-tracking", "mtl-lora-storage", "mtl-lora-serve"}  # the operator's Secrets
    for path, objects in OBJECTS.items():
        for found in objects:
            if found["kind"] != "Kustomization":
                made.add(found["metadata"].get("name", ""))
                continue
            folder = path.partition("/")[0]
            maps = found["configMapGenerator"]
            made |= {entry["name"] for entry in maps}
            files = [*found["resources"], *(name for entry in maps for name in entry["files"])]
            assert {f"{folder}/{name}" for name in files if name != "../base"} <= FILES.keys()
    for _, template in _pods():
        spec = template["spec"]
        (container,) = spec["containers"]
        named = {entry["secretRef"]["name"] for entry in container.get("envFrom", [])}
        named |= {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v}
        named |= {v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
        assert named | {spec.get("serviceAccountName", "mtl-lora-submitter")} <= made


def test_runs_in_a_bucket_need_no_storage_that_nodes_share() -> None:
    config = _config("run_root=s3://bucket/runs", "tracking.uri=https://mlflow.example")
    files = _rendered(config)
    assert "PersistentVolumeClaim" not in "".join(files.values()) and "persistentVolumeClaim" not in str(files)
    assert yaml.safe_load(files["base/kustomization.yaml"])["resources"] == [
        "account.yaml",
        "network.yaml",
        "disruption.yaml",
    ]
    assert yaml.safe_load(files["base/run.yaml"])["run_root"] == "s3://bucket/runs"
    cluster = yaml.safe_load(files["cpu/raycluster.yaml"])["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]},
            kubernetes_validate.latest_version(),
            strict=True,
        )
        (container,) = group["template"]["spec"]["containers"]
        (cache,) = [entry["value"] for entry in container["env"] if entry["name"] == "MTL_LORA_CACHE"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == cache]
        volume = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == mount["name"])
        assert "emptyDir" in volume and not mount.get("readOnly")


def test_the_disruption_budgets_and_policies_find_pods() -> None:
    labels = [template["metadata"]["labels"] for _, template in _pods()]
    for path in ("base/disruption.yaml", "base/network.yaml"):
        for found in OBJECTS[path]:
            spec = found["spec"]
            wanted = (spec.get("selector") or spec["podSelector"])["matchLabels"]
            assert any(wanted.items() <= of.items() for of in labels), found["metadata"]["name"]


def test_the_queue_admits_what_it_is_named_by() -> None:
    for name in ("rayjob", "raycluster"):
        assert "kueue.x-k8s.io/queue-name" in _object(f"kueue/{name}.yaml")["metadata"]["labels"]
        assert "kueue.x-k8s.io/queue-name" not in _object(f"gpu/{name}.yaml")["metadata"]["labels"]
    assert _object("kueue/rayjob.yaml")["spec"]["suspend"]


def test_no_secret_and_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    uri = "postgresql://mlflow:canary@db/mlflow"  # gitleaks:allow
    files = _rendered(_config(f"tracking.uri={uri}", f"run_root={tmp_path}", f"manifest={tmp_path}/manifest.json"))
    assert not [path for path, text in files.items() if "canary" in text or str(tmp_path) in text]
    (tmp_path / "run.yaml").write_text(files["base/run.yaml"])
    there = load_config(tmp_path / "run.yaml")
    assert there.run_root == Path("/app/runs") and there.manifest is None and there.schedule == _config().schedule


def test_the_service_follows_the_champion_with_a_token() -> None:
    from ray.serve.schema import ServeDeploySchema

    from pipeline.serving.server import TOKEN, application
    from pipeline.serving.server_config import ServerConfig

    text = FILES["cpu/rayservice.yaml"]
    spec = yaml.safe_load(text)["spec"]
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    config = ServerConfig.model_validate(app.args)
    assert config.model.endswith("@champion") and config.needs_token
    assert [deployment.name for deployment in app.deployments] == ["scores"]
    assert f"{TOKEN}:" not in text
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["replicas"] == config.replicas
    (container,) = workers["template"]["spec"]["containers"]
    assert {"secretRef": {"name": "mtl-lora-serve"}} in container["envFrom"] and "env" not in container
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}


def test_a_plan_writes_the_files_of_its_own_numbers(tmp_path: Path, mtl_lora: Run) -> None:  # noqa: F811
    folder = tmp_path / "deploy"
    path, settings = _configuration(tmp_path, ROWS), ["training.global_batch_size=4", "model.num_layers=1"]
    done = mtl_lora("plan", "--no-calibrate", "--manifests", folder, "--image", IMAGE, "--config", path, *settings)
    assert done.code in (0, 3), done.err  # 3: this machine is too small, which is an answer too
    config = load_config(path, settings)
    planned = RunPlan.read(RunFolder(config.folder).plan)
    expected = manifests(config, sizing(config, planned.training), IMAGE)
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.yaml")} == expected


def test_a_plan_of_memory_alone_writes_no_files(tmp_path: Path, mtl_lora: Run) -> None:  # noqa: F811
    done = mtl_lora("plan", "--memory", "--manifests", tmp_path / "deploy", "--config", _configuration(tmp_path, ROWS))
    assert done.code == 2 and "leave one of them out" in done.err
    assert not (tmp_path / "deploy").exists()
