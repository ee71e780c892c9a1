"""What all pictures share: two palettes, and files made without matplotlib's global state."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from llava_keeplora_eval.files import write_atomic

DPI = 150


@dataclass(frozen=True)
class Palette:
    """Colours of a picture's paper, its ink and what stands back, and the part of viridis seen on the paper."""

    paper: str
    ink: str
    faint: str
    visible: tuple[float, float]


LIGHT = Palette(paper="#ffffff", ink="#1c2024", faint="#c4c9cf", visible=(0.0, 0.88))
DARK = Palette(paper="#16191d", ink="#e6e8eb", faint="#4a5058", visible=(0.3, 1.0))


def encode(figure: Figure, kind: str) -> bytes:
    """The picture as bytes.

    Args:
        figure: what to draw; made with ``Figure(...)``, so that pyplot and its backend are never touched.
        kind: ``png`` or ``svg``.
    """
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}  # no clock in the file
    figure.savefig(buffer, format=kind, dpi=DPI, facecolor=figure.get_facecolor(), metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path, png: bytes | None = None) -> list[Path]:
    """Write the picture as PNG and as SVG beside each other.

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
