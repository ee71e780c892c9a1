"""Tables of runs: methods × seeds × orders of tasks, one run for each combination."""

from llava_keeplora.compare.ablation import Ablation, draw_ablation, load_ablation
from llava_keeplora.compare.run_table import TableResult, compare
from llava_keeplora.compare.table import Order, Table, Tuning, load_table, parse_table
from llava_keeplora.compare.tradeoff import draw_tradeoff
from llava_keeplora.compare.writers import write_table

__all__ = [
    "Ablation",
    "Order",
    "Table",
    "TableResult",
    "Tuning",
    "compare",
    "draw_ablation",
    "draw_tradeoff",
    "load_ablation",
    "load_table",
    "parse_table",
    "write_table",
]
