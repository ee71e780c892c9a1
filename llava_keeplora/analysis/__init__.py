"""Where a model keeps what it knows, and where a run's updates lie."""

from llava_keeplora.analysis.knowledge import ENERGIES, analyze_model
from llava_keeplora.analysis.updates import analyze_run
from llava_keeplora.analysis.writers import knowledge_table, updates_table

__all__ = ["ENERGIES", "analyze_model", "analyze_run", "knowledge_table", "updates_table"]
