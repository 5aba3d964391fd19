"""Raw records → validated WebDataset shards and their manifest."""

from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.prepare import Mapper, prepare
from pipeline.ingestion.publish import publish
from pipeline.ingestion.synthetic_ads import SyntheticAdsConfig, generate, synthetic_ads_tasks, write_partition

__all__ = [
    "DataConfig",
    "Mapper",
    "SyntheticAdsConfig",
    "generate",
    "prepare",
    "publish",
    "synthetic_ads_tasks",
    "write_partition",
]
