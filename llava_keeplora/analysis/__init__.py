"""Analyses of where a model's abilities and a run's updates lie, relative to the principal subspaces."""

from llava_keeplora.analysis.knowledge import ENERGIES, analyze_model
from llava_keeplora.analysis.updates import analyze_run
from llava_keeplora.analysis.writers import (
    knowledge_table,
    output_folder,
    updates_table,
    write_knowledge,
    write_updates,
)

__all__ = [
    "ENERGIES",
    "analyze_model",
    "analyze_run",
    "knowledge_table",
    "output_folder",
    "updates_table",
    "write_knowledge",
    "write_updates",
]
