"""Reports of results: tables, plots and an HTML page, from data in memory or from run folders."""

from llava_keeplora.report.capacity import protected_fraction_plot
from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.heatmap import heatmap
from llava_keeplora.report.results import Cost, Trial
from llava_keeplora.report.run_report import write_run_report
from llava_keeplora.report.terminal import summary
from llava_keeplora.report.write_report import write_report

__all__ = [
    "Cost",
    "ReportError",
    "Trial",
    "heatmap",
    "protected_fraction_plot",
    "summary",
    "write_report",
    "write_run_report",
]
