"""Exports of a run's result for other programs, and the import that continues from one."""

from llava_keeplora.export.adapter_set import export_set
from llava_keeplora.export.exported import FORMS, AdapterSet, Exported
from llava_keeplora.export.import_state import import_state
from llava_keeplora.export.predict import load_run_predictor
from llava_keeplora.export.run_export import export_run
from llava_keeplora.export.verify import Deviation

__all__ = [
    "FORMS",
    "AdapterSet",
    "Deviation",
    "Exported",
    "export_run",
    "export_set",
    "import_state",
    "load_run_predictor",
]
