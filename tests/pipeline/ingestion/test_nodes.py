"""Preparation on a cluster of several nodes, each a raylet with one core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.ingestion import prepare
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.mapping import mapper
from tests.pipeline.ingestion.test_resume_and_append import SPAM, config_of, content, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayConfig]:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address)
    yield RayConfig(address=nodes.address)
    ray.shutdown()
    nodes.shutdown()


def node_of(number: int) -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_two_nodes_write_the_bytes_of_one_process(two_nodes: RayConfig, tmp_path: Path) -> None:
    write_files(tmp_path / "in", files=9, rows=100)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "one", seed=0)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "two", seed=0, mapper=mapper(two_nodes, alone_s=0))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_both_nodes_are_put_to_work(two_nodes: RayConfig) -> None:
    assert len(set(list(mapper(two_nodes, alone_s=0)(node_of, range(9)))[1:])) == 2
