"""Prepared shards → the same batches of many tasks on any number of machines."""

from pipeline.stream.mixture import Mixture, Proportional, Temperature, Weights
from pipeline.stream.stream import MixedStream, manifest_sha256, read_split

__all__ = ["MixedStream", "Mixture", "Proportional", "Temperature", "Weights", "manifest_sha256", "read_split"]
