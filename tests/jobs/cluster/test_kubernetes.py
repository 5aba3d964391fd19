"""The CronJob's pod makes one RayJob of its Job's name and ends as that one does."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.kubernetes import RayJobs, run
from pipeline.errors import InputError
from tests.pipeline.https_server import certificate
from tests.pipeline.local_server import LocalServer

TEMPLATE = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"generateName": "a-", "labels": {"a": "b"}}}
PATH = "/apis/ray.io/v1/namespaces/ads/rayjobs"


class Api(LocalServer):
    """Speaks what is asked of Kubernetes' API; each look at a RayJob sees its next status, the last one for ever.

    Attributes:
        statuses: of every RayJob, in their order.
        failures: statuses that the next answers have.
        jobs: that were made.
        tokens: that were shown.
    """

    def __init__(self, certificate: Path, statuses: list[dict[str, str]], failures: list[int]) -> None:
        self.statuses, self.failures = statuses, failures
        self.jobs: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        super().__init__(certificate)

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        self.requests[request.command] += 1
        self.tokens.add(request.headers.get("Authorization"))
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        status, found = (self.failures.pop(0), {}) if self.failures else self._found(request, body)
        data = json.dumps(found).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _found(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any]]:
        if request.command == "POST" and request.path == PATH:
            job = json.loads(body)
            name = job["metadata"]["name"]
            if name in self.jobs:
                return 409, {}
            self.jobs[name] = job
            return 201, job
        if request.path.removeprefix(f"{PATH}/") not in self.jobs:
            return 404, {}
        return 200, {"status": self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]}


@pytest.fixture
def account(tmp_path: Path) -> Path:
    certificate(tmp_path)
    (tmp_path / "certificate.pem").rename(tmp_path / "ca.crt")
    (tmp_path / "namespace").write_text("ads")
    (tmp_path / "token").write_text("of-the-pod\n")
    return tmp_path


def _api(account: Path, *statuses: dict[str, str], failures: tuple[int, ...] = ()) -> Api:
    return Api(account / "localhost.pem", list(statuses), list(failures))


def _run(api: Api, account: Path, name: str = "mtl-lora-retrain-1") -> int:
    return run(RayJobs(api.url, account), TEMPLATE, name, "uid-1", interval_s=0.01)


FAILED = "Job entrypoint command failed with exit code {}, last available logs: …"


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": FAILED.format(3)}, 3),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED", "message": FAILED.format(1)}, 1),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "a key"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
    ],
)
def test_the_pod_ends_with_its_ray_job(account: Path, last: dict[str, str], code: int) -> None:
    with _api(account, {}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, last) as api:
        assert _run(api, account) == code
    (job,) = api.jobs.values()
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "mtl-lora-retrain-1", "uid": "uid-1"}
    ]
    assert job["metadata"]["name"] == "mtl-lora-retrain-1" and job["metadata"]["labels"] == {"a": "b"}
    assert "generateName" not in job["metadata"] and api.tokens == {"Bearer of-the-pod"}


def test_a_second_run_of_a_day_is_another_ray_job_and_a_pod_that_comes_again_finds_its_own(account: Path) -> None:
    done = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    with _api(account, done) as api:
        assert [_run(api, account, name) for name in ("retrain-1", "retrain-2", "retrain-2")] == [0, 0, 0]
    assert list(api.jobs) == ["retrain-1", "retrain-2"] and api.requests["POST"] == 3


def test_an_api_that_is_away_is_asked_again(account: Path) -> None:
    with _api(account, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, failures=(503, 429)) as api:
        assert _run(api, account) == 0
    assert api.requests["POST"] == 3


@pytest.mark.parametrize("status", [401, 403, 422])
def test_an_api_that_refuses_is_not_asked_again(account: Path, status: int) -> None:
    with _api(account, {}, failures=(status,)) as api, pytest.raises(InputError, match=f"{status}.*Role"):
        _run(api, account)
    assert api.requests["POST"] == 1


def test_an_api_with_another_certificate_gets_no_token(account: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    certificate(other)
    with Api(other / "localhost.pem", [{}], []) as api, pytest.raises(InputError, match="certificate"):
        _run(api, account)
    assert not api.tokens
