"""Plot of the protected fraction of each layer's input space, stage after stage."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.figures import LIGHT, Palette, save
from llava_keeplora.report.lines import draw_layer_lines
from llava_keeplora.report.results import CapacityStages, LayerLines
from llava_keeplora.run_folder import Capacity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

YLABEL = "protected fraction of the input space (k / in)"


def protected_fraction_plot(
    capacity: CapacityStages, path: str | Path, stages: Sequence[str] | None = None
) -> list[Path]:
    """Plot the protected fraction k/in of every layer over the stages, one panel per part of the model.

    k is the number of protected directions (columns of the layer's basis) and in the width of its input;
    at 1 the layer can learn nothing more.

    Args:
        capacity: one mapping per stage, layer name -> ``{"in": int, "k": int, "part": str}``; stage 0 is the
            weight basis alone, then one stage after each task. A layer absent from a stage leaves a gap.
        path: the file, with or without ``.png``; an SVG is written next to it.
        stages: a name for every stage; "weights", "task 1", ... when None.

    Returns:
        The PNG's path and the SVG's.

    Raises:
        ReportError: no stage, no layer, a layer without ``in``, ``k`` and ``part``, k not in 0..in, or
            another number of names than stages.
        OSError: the folder is missing or cannot be written to.
    """
    return save(draw_protected_fraction(capacity, stages), path)


def draw_protected_fraction(
    capacity: CapacityStages, stages: Sequence[str] | None = None, palette: Palette = LIGHT
) -> Figure:
    """Return the plot of the protected fraction as a figure."""
    parts = fractions(capacity)
    stages = (
        list(stages) if stages is not None else ["weights", *(f"task {t}" for t in range(1, len(capacity)))]
    )
    if len(stages) != len(capacity):
        raise ReportError(
            f"{len(capacity)} stages of capacity have {len(stages)} names", "give one name per stage"
        )
    return draw_layer_lines(parts, stages, YLABEL, palette)


def fractions(capacity: CapacityStages) -> LayerLines:
    """Return part -> layer -> k/in per stage, layers in the order of the numbers in their names.

    Raises:
        ReportError: see `protected_fraction_plot`.
    """
    values: list[dict[tuple[str, str], float]] = []
    for stage, layers in enumerate(capacity):
        values.append({})
        for name, record in layers.items():
            try:
                size = Capacity.from_dict(record)
            except KeyError as error:
                raise ReportError(
                    f"layer '{name}' of stage {stage} has the keys {sorted(record)}",
                    "give it 'in', 'k' and 'part'",
                ) from error
            if not 0 <= size.protected <= size.width or size.width == 0:
                raise ReportError(
                    f"layer '{name}' of stage {stage} protects {size.protected} of {size.width} directions",
                    "give 0 <= k <= in, and in above 0",
                )
            values[-1][size.part, name] = size.protected / size.width
    lines = layer_lines(values)
    if not lines:
        raise ReportError(
            "the capacity names no layer", "leave the plot out, or run a method that protects directions"
        )
    return lines


def layer_lines(values: Sequence[dict[tuple[str, str], float]]) -> LayerLines:
    """Return part -> layer -> its numbers, from one mapping (part, layer) -> number per stage.

    A stage without a number for a layer gives NaN.
    """
    # Files list layers alphabetically, layer 10 before layer 2; parts keep the order of the files.
    names = dict.fromkeys(key for stage in values for key in stage)
    parts: dict[str, dict[str, list[float]]] = {part: {} for part, _ in names}
    for part, name in sorted(names, key=lambda key: _natural(key[1])):
        parts[part][name] = [stage.get((part, name), math.nan) for stage in values]
    return parts


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
