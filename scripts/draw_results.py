"""Draw the plots of README and docs/results.md from the numbers in docs/results: Transfer against Last.

python scripts/draw_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_keeplora.compare import load_table
from llava_keeplora.compare.run_table import Tried
from llava_keeplora.compare.tradeoff import (
    GREY,
    LAST,
    TRANSFER,
    draw_rows,
    label_rows,
    method_looks,
    tradeoff_figure,
)
from llava_keeplora.report.figures import LIGHT, bare, encode, new_figure
from llava_keeplora_eval.matrix import ZERO_SHOT

DOCS = Path(__file__).parents[1] / "docs"
#: The methods in colour, in the README's plot with their names; the others are grey.
COLOURED = ("seq-lora", "keeplora", "balanced", "task-lora-balanced", "eblora", "balanced-rejection")
LLAVA_COLOURED = ("seq-lora", "keeplora", "keeplora++", "eblora", "merge", "task-lora")


def read(name: str) -> Any:
    """Return the content of a result file of the table of learned tasks."""
    return json.loads((DOCS / f"results/table-learned{name}.json").read_text())


def rows_of_methods(table: str, name: str) -> dict[str, Any]:
    """Return the rows of a result file's first order that are methods of the table, zero-shot or bounds."""
    labels = load_table(table).methods
    return {label: row for label, row in read(name)["I"].items() if label in (ZERO_SHOT, *labels)}


def fast_rows() -> dict[str, Any]:
    """Return the rows of order 1 at 2e-3."""
    return rows_of_methods("table-learned", "-fast")


def tradeoff():
    """Return the plot of docs/results.md: the settings tried, the tuned rows, and all rows at 2e-3."""
    orders = {"order 1, tuned by Average, test": read("")["I"], "order 1 at 2e-3, test": fast_rows()}
    labels = list(load_table("table-learned").methods)
    return tradeoff_figure(labels, [Tried(**one) for one in read("-tried")], orders, coloured=COLOURED)


def llava_tradeoff():
    """Return the plot of LLaVA: the settings tried, the tuned rows, and all rows with half of the images."""
    runs = read("-llava")
    labels = list(load_table("table-learned-llava").methods)
    orders = {
        "order I, tuned by Average, test": runs["I"] | runs["tuned"],
        "order I, 400 images, 2e-3, test": rows_of_methods("table-learned-llava", "-llava-400"),
    }
    tried = [Tried(**one) for one in read("-llava-tried")]
    return tradeoff_figure(labels, tried, orders, coloured=LLAVA_COLOURED)


def readme_tradeoff():
    """Return the plot of the README: the rows at 2e-3."""
    rows, looks = fast_rows(), method_looks(COLOURED)
    looks = {label: looks[label] | {"markersize": 8} for label in (*COLOURED, ZERO_SHOT)}
    figure = new_figure((7.6, 4.8), LIGHT)
    axes = figure.subplots()
    draw_rows(axes, rows, looks)
    bare(axes, LIGHT)
    axes.set(xlabel=LAST, ylabel=TRANSFER, xlim=(34.5, 67), ylim=(33.5, 53.5), yticks=range(35, 55, 5))
    axes.annotate(
        "better",
        (0.985, 0.985),
        xytext=(-34, -32),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        color=LIGHT.ink,
        arrowprops={"arrowstyle": "->", "color": LIGHT.ink},
    )
    label_rows(
        axes, rows, {label: look["color"] for label, look in looks.items()}, fontsize=10, weight="bold"
    )
    label_rows(axes, rows, {label: GREY for label in rows if label not in looks})
    return figure


if __name__ == "__main__":
    (DOCS / "images/transfer-last.png").write_bytes(encode(readme_tradeoff(), "png"))
    (DOCS / "images/transfer-last-settings.png").write_bytes(encode(tradeoff(), "png"))
    (DOCS / "images/transfer-last-llava.png").write_bytes(encode(llava_tradeoff(), "png"))
