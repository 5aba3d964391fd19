"""Raw records → validated WebDataset shards and their manifest."""

from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.drift import DriftConfig, DriftReport, DriftThresholds, compare_drift
from pipeline.ingestion.prepare import Mapper, prepare
from pipeline.ingestion.publish import publish
from pipeline.ingestion.schemas import record_schema, write_schemas
from pipeline.ingestion.synthetic_ads import SyntheticAdsConfig, generate, synthetic_ads_tasks, write_partition

__all__ = [
    "DataConfig",
    "DriftConfig",
    "DriftReport",
    "DriftThresholds",
    "Mapper",
    "SyntheticAdsConfig",
    "compare_drift",
    "generate",
    "prepare",
    "publish",
    "record_schema",
    "synthetic_ads_tasks",
    "write_partition",
    "write_schemas",
]
