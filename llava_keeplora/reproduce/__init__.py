"""Comparison of a run with the published figures that its configuration expects."""

from __future__ import annotations

from llava_keeplora.reproduce.figures import (
    NOT_COMPARABLE,
    NOT_REPRODUCED,
    REPRODUCED,
    VERDICTS,
    Figure,
    compare,
    comparison,
    count_verdicts,
    write_comparison,
)
from llava_keeplora.reproduce.protocol import Measured, check_expected, differences, read_measured

__all__ = [
    "NOT_COMPARABLE",
    "NOT_REPRODUCED",
    "REPRODUCED",
    "VERDICTS",
    "Figure",
    "Measured",
    "check_expected",
    "compare",
    "comparison",
    "count_verdicts",
    "differences",
    "read_measured",
    "write_comparison",
]
