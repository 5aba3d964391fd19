"""Raw records → validated WebDataset shards and their manifest."""

from pipeline.ingestion.columns import with_columns
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.drift import DriftConfig, DriftReport, DriftThresholds, compare_drift
from pipeline.ingestion.prepare import Mapper, prepare
from pipeline.ingestion.publish import publish
from pipeline.ingestion.schemas import record_schema, write_schemas

__all__ = [
    "DataConfig",
    "DriftConfig",
    "DriftReport",
    "DriftThresholds",
    "Mapper",
    "compare_drift",
    "prepare",
    "publish",
    "record_schema",
    "with_columns",
    "write_schemas",
]
