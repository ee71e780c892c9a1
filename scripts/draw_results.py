"""Draw the plot of docs/results.md from the numbers in docs/results: Transfer against Last of all methods.

python scripts/draw_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_keeplora.compare import load_table
from llava_keeplora.compare.run_table import Tried
from llava_keeplora.compare.tradeoff import tradeoff_figure
from llava_keeplora.report.figures import encode
from llava_keeplora_eval.matrix import ZERO_SHOT

DOCS = Path(__file__).parents[1] / "docs"


def tradeoff():
    """Return the plot: the settings tried, the tuned rows, and all at the rate at which tasks are learned."""
    names = {"tried": "-tried", "tuned": "", "fast": "-fast"}
    read: dict[str, Any] = {
        name: json.loads((DOCS / f"results/table-learned{suffix}.json").read_text())
        for name, suffix in names.items()
    }
    labels = list(load_table("table-learned").methods)
    tuned, fast = read["tuned"]["I"], read["fast"]["I"]
    bounds = {label: row for label, row in tuned.items() if row["transfer_mean"] is None}
    fast = {label: row for label, row in fast.items() if label in (ZERO_SHOT, *labels)} | bounds
    orders = {"order 1, tuned by Average, test": tuned, "order 1 at 2e-3, test": fast}
    return tradeoff_figure(labels, [Tried(**one) for one in read["tried"]], orders)


if __name__ == "__main__":
    (DOCS / "images/transfer-last.png").write_bytes(encode(tradeoff(), "png"))
