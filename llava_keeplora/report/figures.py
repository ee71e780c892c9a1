"""Shared parts of all plots: palette, line styles, and files written without matplotlib's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_keeplora_eval.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

DPI = 150
#: Okabe and Ito's colours (2008), which colour-blind readers can distinguish, ordered so that neighbours
#: differ most.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
#: Width in inches of an entry of a legend without its text, and of each of its letters.
LEGEND_MARK, LEGEND_LETTER = 0.6, 0.085
#: Height of a line of a legend, inches.
LEGEND_LINE = 0.205
#: Line styles, used once the colours have run out: with five, 30 lines can be distinguished.
STYLES = ("-", "--", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
#: Line style of bounds.
BOUND_LINE = "-."
#: Size of the names of points, and where such a name may stand: points to the right of its point and above.
NAME_SIZE = 7
NAME_PLACES = (
    *((5, 0), (-5, 0), (0, 5), (0, -5), (4, 4), (4, -4), (-4, 4), (-4, -4)),
    *((0, 12), (0, -12), (9, 7), (9, -7), (-9, 7), (-9, -7)),
)
#: The line styles' counterpart for bars.
HATCHES = ("", "////", "....", "xxxx", "----")


@dataclass(frozen=True)
class Palette:
    """Colours of a plot.

    Args:
        paper: the background.
        ink: text and lines.
        faint: grid and frames.
        visible: the range of the colour map viridis that contrasts with the background.
    """

    paper: str
    ink: str
    faint: str
    visible: tuple[float, float]


LIGHT = Palette(paper="#ffffff", ink="#1c2024", faint="#c4c9cf", visible=(0.0, 0.88))
#: Number of colours of a PNG: enough for anti-aliased lines of six colours or for a map's scale, at a fifth
#: of the size.
PNG_COLOURS = 64


def new_figure(size: tuple[float, float], palette: Palette) -> Figure:
    """Return an empty figure of a size in inches, with the palette's background.

    matplotlib is imported by the functions that draw, not by the modules: a run draws at its end only, and
    must not wait for the import at its start.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=size, facecolor=palette.paper, layout="constrained")


def style(position: int) -> dict[str, Any]:
    """Return colour and line style of the method at a position, the same in every plot of a page."""
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
    """Add one legend for all panels, above them; the figure grows by each line after its first."""
    entries = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if entries:
        widest = LEGEND_MARK + LEGEND_LETTER * max(map(len, entries))
        columns = max(1, min(len(entries), int(figure.get_figwidth() / widest)))
        further = math.ceil(len(entries) / columns) - 1
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * further)
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside upper left",
            ncols=columns,
            labelcolor=palette.ink,
            facecolor=palette.paper,
            edgecolor=palette.paper,
            fontsize=9,
        )


def label_points(
    axes: Axes,
    points: Mapping[str, Sequence[float]],
    lines: Sequence[float],
    colours: Mapping[str, str],
    palette: Palette,
    **text: Any,
) -> None:
    """Write names next to points, each at the first place where it covers no point and no name, if any.

    Args:
        axes: a panel whose content, apart from the names, is complete.
        points: name → its point and the lengths of its bars to either side, horizontal and vertical; no name
            covers any of them.
        lines: where vertical lines stand; a name that has no other place interrupts one.
        colours: name → its colour, in the order of their claim to a place.
        palette: the plot's colours.
        text: settings of the names, as of matplotlib's `Text`.
    """
    from matplotlib.transforms import Bbox

    size = text.setdefault("fontsize", NAME_SIZE)
    axes.figure.draw_without_rendering()  # the layout, which places are measured in
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    place, unit, panel = axes.transData.transform, axes.figure.dpi / 72, axes.bbox
    taken = [other.get_window_extent() for other in axes.texts]
    for x, y, dx, dy in points.values():
        (x0, y0), (x1, y1), (at_x, at_y) = place([(x - dx, y - dy), (x + dx, y + dy), (x, y)])
        taken += [
            Bbox.from_extents(at_x - 4 * unit, at_y - 4 * unit, at_x + 4 * unit, at_y + 4 * unit),
            Bbox.from_extents(x0, at_y - unit, x1, at_y + unit),
            Bbox.from_extents(at_x - unit, y0, at_x + unit, y1),
        ]
    at_lines = [place((x, 0))[0] for x in lines]
    crossed = [Bbox.from_extents(x - unit, panel.y0, x + unit, panel.y1) for x in at_lines]
    for name, colour in colours.items():
        note = axes.annotate(
            name,
            points[name][:2],
            xytext=(0, 0),
            textcoords="offset points",
            color=colour,
            zorder=4,
            **text,
        )
        note.set_in_layout(False)
        for avoided in (taken + crossed, taken):
            if _set_free_place(note, size / NAME_SIZE, avoided, panel):
                taken.append(note.get_window_extent())
                break
        else:
            note.remove()
            continue
        if taken[-1].count_overlaps(crossed):
            note.set_bbox({"facecolor": palette.paper, "edgecolor": "none", "pad": 0.5})


def _set_free_place(note: Annotation, scale: float, avoided: Sequence[Bbox], panel: Bbox) -> bool:
    """Move a name to its first place in a panel that overlaps none of some boxes; False if there is none."""
    for dx, dy in NAME_PLACES:
        # The side that is nearest to the point stands at that distance.
        ha = "left" if dx > 0 else "right" if dx < 0 else "center"
        va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
        note.set(position=(dx * scale, dy * scale), ha=ha, va=va)
        box = note.get_window_extent()
        inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
        if inside and not box.count_overlaps(avoided):
            return True
    return False


def encode(figure: Figure, kind: str) -> bytes:
    """Return the plot as bytes.

    Args:
        figure: what to draw; made with ``new_figure``, so that pyplot and its backend are never touched.
        kind: ``png`` or ``svg``.
    """
    if kind == "png":
        data = _with_few_colours(_drawn(figure))
    else:
        buffer = io.BytesIO()
        no_clock = {"Date": None}
        figure.savefig(buffer, format=kind, dpi=DPI, facecolor=figure.get_facecolor(), metadata=no_clock)
        data = buffer.getvalue()
    # The layout is computed once; the second file is drawn with the same one. The name "none" would leave an
    # engine that does nothing, for which matplotlib goes through the whole drawing once more.
    figure.set_layout_engine(None)
    return data


def _drawn(figure: Figure) -> Image.Image:
    """Return the plot's pixels, drawn once: `savefig` goes through the drawing twice, and writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # see new_figure

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _with_few_colours(image: Image.Image) -> bytes:
    quantized = image.quantize(PNG_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # Quantization may shift the background's colour a little, but it must be exactly the page's.
    palette, number, colour = quantized.getpalette(), quantized.getpixel((0, 0)), image.getpixel((0, 0))
    assert isinstance(number, int) and isinstance(colour, tuple)
    palette[3 * number : 3 * number + 3] = colour
    quantized.putpalette(palette)
    smaller = io.BytesIO()
    quantized.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def save(figure: Figure, path: str | Path, png: bytes | None = None) -> list[Path]:
    """Write the plot as PNG and as SVG in the same folder.

    Args:
        figure: what to draw.
        path: the file, without a suffix or with ``.png`` or ``.svg``; its folder must exist.
        png: ``encode(figure, "png")`` where the caller has it already.

    Returns:
        The PNG's path and the SVG's.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    write_atomic(paths[0], png if png is not None else encode(figure, "png"))
    write_atomic(paths[1], encode(figure, "svg"))
    return paths
