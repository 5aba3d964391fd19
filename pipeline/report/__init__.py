"""The report of a run: one self-contained HTML page."""

from pipeline.report.content import EvaluatedModel, ReportPage
from pipeline.report.page import write_report

__all__ = ["EvaluatedModel", "ReportPage", "write_report"]
