"""Prepared shards → the same batches of many tasks on any number of machines."""

from typing import TYPE_CHECKING, Any

from pipeline.stream.cache import CacheConfig
from pipeline.stream.grouping import LengthGrouping
from pipeline.stream.ledger import SampleLedger, merge_ledgers
from pipeline.stream.manifest import load_manifest, manifest_sha256
from pipeline.stream.mixture import AnyMixture, LossDriven, Mixture, Proportional, Temperature, Weights
from pipeline.stream.plan import StreamPlan, plan_stream
from pipeline.stream.read_split import read_split
from pipeline.stream.stream import MixedStream
from pipeline.stream.wds_stage import StreamStage, to_sample

if TYPE_CHECKING:
    from pipeline.stream.dataset import StreamDataset

__all__ = [
    "AnyMixture",
    "CacheConfig",
    "LengthGrouping",
    "LossDriven",
    "MixedStream",
    "Mixture",
    "Proportional",
    "SampleLedger",
    "StreamDataset",
    "StreamPlan",
    "StreamStage",
    "Temperature",
    "Weights",
    "load_manifest",
    "manifest_sha256",
    "merge_ledgers",
    "plan_stream",
    "read_split",
    "to_sample",
]


def __getattr__(name: str) -> Any:
    """Import torch only for those who ask for its data set: planning and caching start 4 s sooner without it."""
    if name == "StreamDataset":
        from pipeline.stream.dataset import StreamDataset

        return StreamDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
