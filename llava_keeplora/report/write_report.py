"""Write the report of results: tables, plots and the HTML page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora.report.capacity import YLABEL, fractions
from llava_keeplora.report.cost import draw_costs
from llava_keeplora.report.curves import draw_curves, draw_forgetting, draw_losses
from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.figures import LIGHT, Palette, encode, save
from llava_keeplora.report.heatmap import colour_limits, draw_heatmap
from llava_keeplora.report.html import PlotImage, render_page
from llava_keeplora.report.latex_csv import latex_tables, report_json, scores_csv, summary_csv, watched_csv
from llava_keeplora.report.lines import draw_layer_lines
from llava_keeplora.report.overlap import draw_overlap
from llava_keeplora.report.results import Results, Trial, mean_cells, mean_lines, mean_matrix
from llava_keeplora.report.tables import bounds_first, is_baseline, markdown_tables, of_seeds
from llava_keeplora.run_folder import (
    LATEX_TABLE,
    REPORT,
    REPORT_JSON,
    SCORES_TABLE,
    SUMMARY_TABLE,
    TABLE,
    WATCHED_TABLE,
)
from llava_keeplora_eval.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Key → file name of a report's documents; its plots come on top.
DOCUMENTS = {
    "table": TABLE,
    "latex": LATEX_TABLE,
    "summary": SUMMARY_TABLE,
    "scores": SCORES_TABLE,
    "json": REPORT_JSON,
    "html": REPORT,
}


@dataclass(frozen=True)
class Plot:
    """A kind of plot.

    Args:
        name: name of its files.
        caption: its caption on the page.
        draw: (results to draw, all results, palette) → the figure, or None where the results lack its data.
    """

    name: str
    caption: str
    draw: Callable[[Results, Results, Palette], Figure | None]


def _heatmap(selected: Results, results: Results, palette: Palette) -> Figure | None:
    ((name, trials),) = selected.items()
    if is_baseline(name, [trial.matrix for trial in trials]) and len(results) > 1:
        return None
    # One scale for all methods, so that the plots can be compared.
    limits = colour_limits(trial.matrix for others in results.values() for trial in others)
    return draw_heatmap(
        mean_matrix([trial.matrix for trial in trials]), name + of_seeds(trials), palette, limits
    )


def _capacity(selected: Results, results: Results, palette: Palette) -> Figure | None:
    (trials,) = selected.values()
    if not all(len(trial.capacity) for trial in trials):
        return None
    stages = ["weights", *trials[0].learned][: min(len(trial.capacity) for trial in trials)]
    return draw_layer_lines(
        mean_lines([fractions(trial.capacity) for trial in trials]), stages, YLABEL, palette
    )


def _captured(selected: Results, results: Results, palette: Palette) -> Figure | None:
    (trials,) = selected.values()
    if not all(trial.captured for trial in trials):
        return None
    lines = mean_lines([trial.captured for trial in trials])
    learned = max(len(line) for layers in lines.values() for line in layers.values())
    return draw_layer_lines(
        lines, trials[0].learned[:learned], "share of the residual gradient's energy", palette
    )


def _overlap(selected: Results, results: Results, palette: Palette) -> Figure | None:
    ((name, trials),) = selected.items()
    if not all(trial.overlap for trial in trials):
        return None
    return draw_overlap(
        trials[0].matrix.tasks,
        mean_cells([trial.overlap for trial in trials]),
        name + of_seeds(trials),
        palette,
    )


#: Plots of all methods together, in the order of the page.
OF_ALL = (
    Plot(
        "curves",
        "Score of every task after every stage; at the dashed line it was learned, left of it not yet. "
        "Dash-dotted: bounds.",
        lambda selected, results, palette: draw_curves(selected, palette),
    ),
    Plot(
        "forgetting",
        "What was lost since each task was learned, in points of percent: left the mean over the tasks "
        "before, after every task; "
        "right each task by the last stage. Below zero: it got better.",
        lambda selected, results, palette: draw_forgetting(selected, palette),
    ),
    Plot(
        "loss",
        "Training loss of every task, as the Trainer logged it. Every panel has a scale of its own.",
        lambda selected, results, palette: draw_losses(selected, palette),
    ),
    Plot(
        "cost",
        "Time of each kind of stage, summed over the tasks, and its highest peak of memory: on a GPU the "
        "tensors of one process, "
        "on a CPU everything that the process holds, libraries included.",
        lambda selected, results, palette: draw_costs(selected, palette),
    ),
)
#: Plots of one method each.
OF_ONE = (
    Plot("heatmap", "Score of every task after every stage; outlined, the task just learned.", _heatmap),
    Plot("capacity", "Share of each layer's input space that is protected, stage after stage.", _capacity),
    Plot(
        "captured",
        "Share of the energy of each layer's first-step gradient, outside the protected subspace, that the "
        "task's adapter directions hold.",
        _captured,
    ),
    Plot(
        "overlap",
        "Overlap of the tasks' input subspaces (the rows of each adapter's A): mean squared cosine of the "
        "principal angles, averaged over "
        "the layers; 1 where one subspace holds the other, 0 where they are orthogonal, about rank / width "
        "for two random ones.",
        _overlap,
    ),
)


def write_report(
    out_dir: str | Path,
    title: str,
    results: Results,
    settings: Mapping | None = None,
    head: str = "",
) -> dict[str, Path]:
    """Write ``report.html`` (self-contained), tables as Markdown, LaTeX, CSV and JSON, plots as PNG and SVG.

    Args:
        out_dir: the folder, created when missing; files of an earlier report are replaced.
        title: the page's title.
        results: label (a method, a run) -> its trials, one per seed, complete or not. Trials labelled
            ``zero-shot`` without any stage are the baseline, which is listed in the summary and, unless it is
            the only result, gets no section.
        settings: the run's settings, which the page lists.
        head: HTML that the page begins with.

    Returns:
        Every written path: ``html``, ``table``, ``latex``, ``summary``, ``scores``, ``json``, ``watched`` of
        a guard that watches recipes, and the PNGs as ``KIND`` or ``KIND/LABEL``.

    Raises:
        ReportError: no results, different tasks, or a capacity that is not valid.
        OSError: the folder cannot be written to.
    """
    _check(results)
    results = bounds_first(results)
    out_dir = Path(out_dir)
    # Drawn before anything is written, so that an invalid capacity leaves no incomplete report.
    figures, images = {}, {}
    for key, plot, selected in _plots(results):
        figure = plot.draw(selected, results, LIGHT)
        if figure is not None:
            figures[key] = figure
            images[key] = PlotImage(encode(figure, "png"), plot.caption)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths, file_names = {}, _file_names(figures)
    for key, figure in figures.items():
        paths[key] = save(figure, out_dir / f"{file_names[key]}.png", images[key].png)[0]
    texts = {
        "table": markdown_tables(title, results),
        "latex": latex_tables(title, results),
        "summary": summary_csv(results),
        "scores": scores_csv(results),
        "json": report_json(results),
        "html": render_page(title, results, images, settings or {}, head),
    }
    names = DOCUMENTS
    if watched := watched_csv(results):
        texts, names = texts | {"watched": watched}, DOCUMENTS | {"watched": WATCHED_TABLE}
    for key, name in names.items():
        paths[key] = out_dir / name
        write_atomic(paths[key], texts[key])
    return paths


def _plots(results: Results):
    """Yield (key, plot, results that it shows) for every plot of a report."""
    yield from ((plot.name, plot, results) for plot in OF_ALL)
    yield from (
        (f"{plot.name}/{label}", plot, {label: trials})
        for label, trials in results.items()
        for plot in OF_ONE
    )


def _check(results: Results) -> None:
    if not results or not all(results.values()):
        raise ReportError("there are no results to report", "give at least one matrix")
    trials = [(label, trial) for label, trials in results.items() for trial in trials]
    for label, trial in trials:
        if trial.matrix.tasks != trials[0][1].matrix.tasks:
            raise ReportError(
                f"'{trials[0][0]}' and '{label}' have different tasks ({_listed(trials[0][1])} against "
                f"{_listed(trial)})",
                "report them apart, because their scores mean different things",
            )
        # A run in progress has fewer stages than tasks; a capacity with more is not of this matrix.
        if len(trial.capacity) > len(trial.matrix.tasks) + 1:
            raise ReportError(
                f"a capacity of {len(trial.capacity)} stages belongs to a matrix of "
                f"{len(trial.matrix.tasks)} tasks",
                "give the stage of the weights, then one stage per task at most",
            )


def _listed(trial: Trial) -> str:
    return ", ".join(trial.matrix.tasks)


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """Return a file name for every plot, unique even if two labels differ in special characters only."""
    files: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")
        # Compared without case, because some disks do.
        taken = {file.casefold() for file in files.values()}
        file, number = base, 2
        while file.casefold() in taken:
            file, number = f"{base}-{number}", number + 1
        files[name] = file
    return files
