"""What a study found as one HTML page, written once or served while the study runs."""

from spansearch.report.data import export_command, report_data
from spansearch.report.page import render
from spansearch.report.serve import ReportServer

__all__ = ["ReportServer", "export_command", "render", "report_data"]
