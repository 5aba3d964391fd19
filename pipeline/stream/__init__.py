"""Prepared shards → the same batches of many tasks on any number of machines."""

from pipeline.stream.cache import CacheConfig
from pipeline.stream.dataset import StreamDataset
from pipeline.stream.grouping import LengthGrouping
from pipeline.stream.ledger import SampleLedger, merge_ledgers
from pipeline.stream.mixture import AnyMixture, LossDriven, Mixture, Proportional, Temperature, Weights
from pipeline.stream.plan import StreamPlan, plan_stream
from pipeline.stream.read_split import read_split
from pipeline.stream.stream import MixedStream, load_manifest, manifest_sha256

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
    "Temperature",
    "Weights",
    "load_manifest",
    "manifest_sha256",
    "merge_ledgers",
    "plan_stream",
    "read_split",
]
