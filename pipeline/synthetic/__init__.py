"""Synthetic Ads data, made from a seed: for the demo, the tests and whoever has no records yet.

Ingestion meets it at two places alone, its configuration and ``pipeline.ingestion.synthetic_source``.
"""

from pipeline.synthetic.ads import TASKS, generate, synthetic_ads_tasks, write_partition
from pipeline.synthetic.config import SyntheticAdsConfig

__all__ = ["TASKS", "SyntheticAdsConfig", "generate", "synthetic_ads_tasks", "write_partition"]
