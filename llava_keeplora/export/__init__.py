"""A run's result as other programs take it."""

from llava_keeplora.export.merged import Deviation, export_merged

__all__ = ["Deviation", "export_merged"]
