"""Shared parts of all plots.

A palette, lines that can be told apart, and files made without matplotlib's global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from llava_keeplora_eval.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
#: Okabe and Ito's colours (2008), told apart by colour-blind readers, in the order that keeps neighbours
#: apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
#: Inches that an entry of a legend takes beside its letters, and each letter.
LEGEND_MARK, LEGEND_LETTER = 0.6, 0.085
#: With as many line styles, three times as many lines can be told apart.
STYLES = ("-", "--", ":")
#: And as many bars.
HATCHES = ("", "////", "....")


@dataclass(frozen=True)
class Palette:
    """Colours of a plot: paper, ink, what stands back, and the part of viridis that shows on the paper."""

    paper: str
    ink: str
    faint: str
    visible: tuple[float, float]


LIGHT = Palette(paper="#ffffff", ink="#1c2024", faint="#c4c9cf", visible=(0.0, 0.88))
#: Colours of a PNG: enough for soft edges of six lines or for a map's scale, and a fifth of the bytes of all
#: colours.
PNG_COLOURS = 64


def new_figure(size: tuple[float, float], palette: Palette) -> Figure:
    """Return an empty figure of a size in inches, on the palette's paper.

    matplotlib is imported here and where else a picture is drawn, because a run draws at its end and would
    wait for it at its start.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=size, facecolor=palette.paper, layout="constrained")


def style(position: int) -> dict[str, str]:
    """Return colour and line style of the method at a position; the same in every plot of a page."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        "linestyle": STYLES[position // len(COLOURS) % len(STYLES)],
    }


def fill(position: int, palette: Palette) -> dict[str, str | float]:
    """Return colour and hatch of a bar, as `style` does for a line."""
    hatch = HATCHES[position // len(COLOURS) % len(HATCHES)]
    return {
        "facecolor": COLOURS[position % len(COLOURS)],
        "hatch": hatch,
        "edgecolor": palette.paper,
        "linewidth": 0,
    }


def bare(axes, palette: Palette) -> None:
    """Give axes the palette's colours, a faint grid and no frame."""
    axes.set_facecolor(palette.paper)
    axes.grid(color=palette.faint, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=palette.ink)
    axes.xaxis.label.set_color(palette.ink)
    axes.yaxis.label.set_color(palette.ink)
    for side in axes.spines.values():
        side.set_visible(False)


def legend_above(figure: Figure, panels: Sequence[Axes], palette: Palette) -> None:
    """Add one legend for all panels, above them."""
    entries = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if entries:
        widest = LEGEND_MARK + LEGEND_LETTER * max(map(len, entries))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside upper left",
            ncols=max(1, min(len(entries), int(figure.get_figwidth() / widest))),
            labelcolor=palette.ink,
            facecolor=palette.paper,
            edgecolor=palette.paper,
            fontsize=9,
        )


def encode(figure: Figure, kind: str) -> bytes:
    """Return the plot as bytes.

    Args:
        figure: what to draw; made with ``new_figure``, so that pyplot and its backend are never touched.
        kind: ``png`` or ``svg``.
    """
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}  # no clock in the file
    figure.savefig(buffer, format=kind, dpi=DPI, facecolor=figure.get_facecolor(), metadata=metadata)
    # Where every artist lies is found out once; the other kind of file is drawn at the same places.
    figure.set_layout_engine("none")
    return buffer.getvalue() if kind == "svg" else _with_few_colours(buffer)


def _with_few_colours(png: io.BytesIO) -> bytes:
    picture = Image.open(png).convert("RGB")
    few = picture.quantize(PNG_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # The paper's own colour and not a mean around it: it has to be that of the page.
    palette, corner = few.getpalette(), 3 * few.getpixel((0, 0))
    palette[corner : corner + 3] = list(picture.getpixel((0, 0)))
    few.putpalette(palette)
    smaller = io.BytesIO()
    few.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def save(figure: Figure, path: str | Path, png: bytes | None = None) -> list[Path]:
    """Write the plot as PNG and as SVG in the same folder.

    Args:
        figure: what to draw.
        path: the file without, or with either, ending; its folder must exist.
        png: ``encode(figure, "png")`` where the caller has it already.

    Returns:
        The PNG's path and the SVG's.

    Raises:
        OSError: the folder is missing, or the disk refuses.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    write_atomic(paths[0], png if png is not None else encode(figure, "png"))
    write_atomic(paths[1], encode(figure, "svg"))
    return paths
