"""Raw records → validated WebDataset shards and their manifest."""

from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.prepare import prepare
from pipeline.ingestion.synthetic_ads import SyntheticAdsConfig, generate, synthetic_ads_tasks, write_partition

__all__ = ["DataConfig", "SyntheticAdsConfig", "generate", "prepare", "synthetic_ads_tasks", "write_partition"]
