from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["DS_ACCELERATOR"] = "cpu"  # the tests' two ranks share a machine, not a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.pipeline.s3_server import S3Server

settings.register_profile("shared_machine", deadline=None)  # a law is no claim of speed, and test machines are noisy
settings.load_profile("shared_machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each slow test time on a slow machine too: its limit is for what hangs."""
    for item in items:
        limit = item.get_closest_marker("timeout")
        if item.get_closest_marker("slow") and (limit is None or limit.args[0] < 900):
            item.add_marker(pytest.mark.timeout(900), append=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real multi-task suites, which lies beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"needs the real suites in {folder}")
    return folder


@pytest.fixture
def s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, which this process and those it starts are told of."""
    from tests.pipeline.s3_server import S3Server

    server = S3Server(tmp_path / "s3")
    server.start()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()
