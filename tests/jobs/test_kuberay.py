"""What the manifests' scripts do with the answers of a cluster, and whether what they name is there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "infra" / "kuberay"
KUBECTL = """#!/bin/sh
case "$*" in
  apply*) cat > applied.yaml ;;
  *jobDeploymentStatus*) head -n 1 answers; sed -i 1d answers ;;
  *jobStatus*) echo {status} ;;
esac
"""


@pytest.mark.parametrize(
    ("deployment", "status", "code"),
    [("Complete", "SUCCEEDED", 0), ("Failed", "FAILED", 1), ("Complete", "FAILED", 1), ("Failed", "", 1)],
)
def test_the_cron_job_ends_with_its_ray_job(tmp_path: Path, deployment: str, status: str, code: int) -> None:
    job = yaml.safe_load((MANIFESTS / "cronjob.yaml").read_text())["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (tmp_path / "answers").write_text(f"\nInitializing\nRunning\n{deployment}\n")
    for name, text in {"kubectl": KUBECTL.format(status=status), "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (script,) = container["args"]
    done = subprocess.run(
        [*container["command"], script.replace("/manifests", str(MANIFESTS))],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == code, done.stderr
    name = yaml.safe_load((tmp_path / "applied.yaml").read_text())["metadata"]["name"]
    assert name.startswith("mtl-lora-retrain-2")
    assert done.stdout == f"{name}: {status}\n"
    assert (tmp_path / "answers").read_text() == ""


def test_the_service_follows_the_champion_with_a_token_and_no_more_rights_than_it_needs() -> None:
    from ray.serve.schema import ServeDeploySchema

    from pipeline.serving.server import TOKEN, application
    from pipeline.serving.server_config import ServerConfig

    text = (MANIFESTS / "rayservice.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    config = ServerConfig.model_validate(app.args)
    assert config.model.endswith("@champion") and config.needs_token
    assert [deployment.name for deployment in app.deployments] == ["scores"]
    assert TOKEN in text and not [line for line in text.splitlines() if f"{TOKEN}:" in line]
    job = yaml.safe_load((MANIFESTS / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == job["rayVersion"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == config.replicas
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == job["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert "env" not in container and all(set(source) == {"secretRef"} for source in container["envFrom"])
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
