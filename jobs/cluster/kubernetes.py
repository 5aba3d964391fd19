"""Make a RayJob from a template and wait for its end, inside a pod of the cluster:

    python -m jobs.cluster.kubernetes /manifests/rayjob.yaml

The RayJob has the name of the Job that the pod belongs to (``JOB_NAME``), which owns it (``JOB_UID``): a second run of
a day is another RayJob, a pod that comes again finds its own, and a Job that is removed takes its RayJob along.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential

from pipeline.errors import InputError
from pipeline.progress import tell

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts a pod's token, the certificate of its API and the name of its namespace."""
_ENDED = ("Complete", "Failed", "ValidationFailed")
_TIMEOUT_S = 30


class _AwayError(Exception):
    """The API answers that it cannot answer now."""


_patiently = retry(
    retry=retry_if_exception_type((_AwayError, requests.ConnectionError, requests.Timeout)),
    wait=wait_exponential(multiplier=0.5, max=30),
    stop=stop_after_delay(600),
    reraise=True,
)


@dataclass(frozen=True)
class RayJobs:
    """The RayJobs of the namespace that a pod runs in.

    Args:
        url: of the API.
        account: folder of the pod's account.
    """

    url: str
    account: Path

    def create(self, job: dict[str, Any]) -> bool:
        """Make a RayJob; whether it was not there already.

        Raises:
            InputError: the API refuses it, or is another one.
        """
        return self._ask("POST", "", job).status_code != requests.codes.conflict

    def status(self, name: str) -> dict[str, Any]:
        """Return a RayJob's status, empty where the operator has not seen it.

        Raises:
            InputError: there is none, or the account may not look at it.
        """
        found: dict[str, Any] = self._ask("GET", f"/{name}").json().get("status") or {}
        return found

    @_patiently
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        namespace = (self.account / "namespace").read_text().strip()
        try:
            answer = requests.request(
                method,
                f"{self.url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}",
                json=body,
                headers={"Authorization": f"Bearer {(self.account / 'token').read_text().strip()}"},  # changes hourly
                verify=str(self.account / "ca.crt"),
                timeout=_TIMEOUT_S,
                allow_redirects=False,
            )
        except requests.exceptions.SSLError as error:  # a ConnectionError that no waiting mends
            raise InputError(
                f"the API must have a certificate of the pod's account, {self.url} has another: {error}; see ca.crt"
            ) from error
        if answer.status_code == requests.codes.too_many_requests or answer.status_code >= 500:
            raise _AwayError(f"the API answered {answer.status_code}")
        if answer.ok or (method == "POST" and answer.status_code == requests.codes.conflict):
            return answer
        raise InputError(
            f"the API must take a RayJob of this account, it answered {answer.status_code}: {answer.text[:500]}; see "
            "the Role mtl-lora-submitter and KubeRay's definitions"
        )


def run(jobs: RayJobs, template: dict[str, Any], name: str, owner_uid: str, interval_s: float = 30) -> int:
    """Make the RayJob of a name, or find it, wait for its end and return the exit code of its driver.

    Args:
        jobs: where it is made.
        template: the RayJob without a name.
        name: of the RayJob and of the Job that owns it.
        owner_uid: of that Job.
        interval_s: between two looks.

    Returns:
        0 where it succeeded, what its driver ended with where KubeRay says so, else 1.

    Raises:
        InputError: the API refuses.
    """
    labels = template["metadata"].get("labels", {})
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}
    job = {**template, "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]}}
    tell(f"{name}: {'made' if jobs.create(job) else 'is there already'}")
    # A job that exits 1 to 3 ends as Complete or Failed, as KubeRay's version has it: the job's own status decides.
    while (status := jobs.status(name)).get("jobDeploymentStatus") not in _ENDED:
        time.sleep(interval_s)
    state = status.get("jobStatus", "")
    tell(f"{name}: {state or status.get('reason', '')} {status.get('message', '')}".rstrip())
    if state == "SUCCEEDED":
        return 0
    code = re.search(r"exit code (\d+)", status.get("message", ""))
    return int(code[1]) or 1 if code else 1


def main() -> None:
    """Run the RayJob of the file that is named."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    template = yaml.safe_load(Path(sys.argv[1]).read_text())
    try:
        sys.exit(run(RayJobs(url, ACCOUNT), template, os.environ["JOB_NAME"], os.environ["JOB_UID"]))
    except InputError as error:
        tell(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
