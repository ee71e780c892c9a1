"""A folder with everything that a run, or several side by side, has to show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from llava_keeplora.report.capacity import Capacity, draw_protected_fraction
from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.figures import DARK, LIGHT, encode, save
from llava_keeplora.report.heatmap import colour_limits, draw_heatmap
from llava_keeplora.report.document import Picture, render_page
from llava_keeplora.report.tables import is_baseline, markdown_tables
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.matrix import Matrix


def write_report(
    out_dir: str | Path,
    title: str,
    results: Mapping[str, Matrix],
    capacity: Mapping[str, Capacity] | None = None,
    settings: Mapping | None = None,
    scores: Mapping[str, list[list[str]]] | None = None,
) -> dict[str, Path]:
    """Write ``report.html`` (self-contained), ``table.md``, and every picture as PNG and SVG.

    Args:
        out_dir: the folder, made when missing; files of an earlier report are replaced.
        title: the page's title.
        results: label (a method, a run) -> its matrix, complete or not; one labelled ``zero-shot`` without any stage is
            the baseline: it stands in the summary and, unless it is alone, gets no picture of its own.
        capacity: label -> protected directions per stage (see ``capacity.Capacity``), for labels that have
            them; an empty list is the same as none.
        settings: what was run, shown as it is.
        scores: label -> rows of `tables.score_rows`, for labels that have them.

    Returns:
        Every written path: ``html``, ``table``, and the PNGs as ``heatmap/LABEL`` and ``capacity/LABEL``.

    Raises:
        ReportError: no results, a capacity for a label without results, or a capacity that is not one.
        OSError: the folder cannot be written.
    """
    capacity = {label: stages for label, stages in (capacity or {}).items() if len(stages)}
    _check(results, capacity)
    out_dir = Path(out_dir)
    # Drawn before anything is written, so that a capacity that is not one leaves no half report.
    limits = colour_limits(results.values())
    figures = {
        f"heatmap/{label}": tuple(draw_heatmap(matrix, label, palette, limits) for palette in (LIGHT, DARK))
        for label, matrix in results.items()
        if not is_baseline(label, matrix) or len(results) == 1
    }
    figures |= {f"capacity/{label}": _capacity_figures(stages, results[label]) for label, stages in capacity.items()}
    pictures = {name: _picture(name, *pair) for name, pair in figures.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    paths, file_names = {}, _file_names(figures)
    for name, (light, _) in figures.items():
        paths[name] = save(light, out_dir / f"{file_names[name]}.png", pictures[name].light)[0]
    paths["table"] = out_dir / "table.md"
    write_atomic(paths["table"], markdown_tables(title, results, scores or {}))
    paths["html"] = out_dir / "report.html"
    write_atomic(paths["html"], render_page(title, results, pictures, settings or {}, scores or {}))
    return paths


def _check(results: Mapping[str, Matrix], capacity: Mapping[str, Capacity]) -> None:
    if not results:
        raise ReportError("there are no results to report", "give at least one matrix")
    strangers = sorted(set(capacity) - set(results))
    if strangers:
        raise ReportError(
            f"there is a capacity for {', '.join(strangers)} and no matrix", "use the same labels for both"
        )


def _capacity_figures(stages: Capacity, matrix: Matrix) -> tuple[Figure, Figure]:
    # A run in progress has fewer stages than tasks; one that isn't of this matrix has more.
    if len(stages) > len(matrix.tasks) + 1:
        raise ReportError(
            f"a capacity of {len(stages)} stages belongs to a matrix of {len(matrix.tasks)} tasks",
            "give the stage of the weights, then one stage per task at most",
        )
    names = ["weights", *matrix.tasks][: len(stages)]
    return draw_protected_fraction(stages, names, LIGHT), draw_protected_fraction(stages, names, DARK)


CAPTIONS = {
    "heatmap": "score of every task after every stage; outlined, the task just learned.",
    "capacity": "share of each layer's input space that is protected, stage after stage.",
}


def _picture(name: str, light: Figure, dark: Figure) -> Picture:
    kind, label = name.split("/", 1)
    return Picture(encode(light, "png"), encode(dark, "png"), f"{label}: {CAPTIONS[kind]}")


def _file_names(names) -> dict[str, str]:
    """A file name for every picture, unique even where two labels differ in signs only."""
    files: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
        # Compared without case, because some disks do.
        taken = {file.casefold() for file in files.values()}
        file, number = base, 2
        while file.casefold() in taken:
            file, number = f"{base}-{number}", number + 1
        files[name] = file
    return files
