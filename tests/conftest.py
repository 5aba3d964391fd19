from __future__ import annotations

import os
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # the tests' two ranks share a machine, not a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # a law is no claim of speed, and test machines are noisy
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real multi-task suites, which lies beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"needs the real suites in {folder}")
    return folder
