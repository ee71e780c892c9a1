"""Pictures and a page from matrices and protected subspaces, all from data in memory."""

from llava_keeplora.report.capacity import protected_fraction_plot
from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.heatmap import heatmap
from llava_keeplora.report.report import write_report

__all__ = ["ReportError", "heatmap", "protected_fraction_plot", "write_report"]
