"""Tables: methods × seeds × orders of tasks, every one a run of its own that shares with the others what it can."""

from llava_keeplora.compare.ablation import Ablation, draw_ablation, load_ablation
from llava_keeplora.compare.outcome import Outcome, compare
from llava_keeplora.compare.files import write_table
from llava_keeplora.compare.table import Order, Table, Tuning, load_table, parse_table

__all__ = ["Ablation", "Order", "Outcome", "Table", "Tuning", "compare", "draw_ablation", "load_ablation", "load_table", "parse_table", "write_table"]
