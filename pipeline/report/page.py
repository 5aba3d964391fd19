"""The writing of the page."""

from __future__ import annotations

from pathlib import Path

from pipeline.contracts import write_atomic
from pipeline.report.content import ReportPage


def write_report(path: str | Path, page: ReportPage) -> None:
    """Write the page as one HTML file that needs nothing else, atomically."""
    from pipeline.report.rendering import render  # takes matplotlib and jinja2 along, which nothing else here needs

    write_atomic(path, render(page))
