"""The report of a run: one self-contained HTML page."""

from pipeline.report.page import EvaluatedModel, ReportPage, write_report

__all__ = ["EvaluatedModel", "ReportPage", "write_report"]
