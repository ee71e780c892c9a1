"""The table of a configuration's published figures in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator

from llava_keeplora.config import ExpectedConfig, load_config
from llava_keeplora.reproduce import Measured, differences

#: The configurations that have published figures.
BENCHMARKS = ("mtil-order1", "mtil-order2", "ucit", "mllm-dcl", "coin")
HEADER = ("row", "published", "tolerance", "the configuration as it ships", "from")


def published_figures(name: str) -> str:
    """Return the published figures of a shipped configuration as a Markdown table."""
    rows = [HEADER, ("---",) * len(HEADER), *figure_rows(name)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figure_rows(name: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield row, figures, tolerance, whether they compare, and source, of a shipped configuration."""
    config = load_config(name)
    for label, why in differences(config, Measured()).items():
        row = config.expected[label]
        figures = ", ".join(f"{key} {value}" for key, value in row.figures.items())
        last = (
            f"; last of each task {' '.join(str(value) for value in row.last.values())}" if row.last else ""
        )
        other = "".join(f", {key} {value:g}" for key, value in row.tolerances.items())
        tolerance = "" if row.not_comparable else f"{row.tolerance:g}{other}: {row.tolerance_from}"
        yield f"`{label}`", figures + last, tolerance, ", and ".join(why) or compared(row), row.source


def compared(row: ExpectedConfig) -> str:
    """Return that a row compares, and which of its figures do not and why."""
    reasons = row.not_comparable_figures.items()
    return "; ".join(["compares", *(f"not comparable: {name}, as {reason}" for name, reason in reasons)])
