"""What a study found as one HTML page, written once or served while the study runs."""

from spansearch.report.data import report_data
from spansearch.report.page import render
from spansearch.report.serve import ReportServer

__all__ = ["ReportServer", "render", "report_data"]
