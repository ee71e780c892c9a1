"""Writers of the analyses: JSON and CSV to compute with, a table in Markdown, plots as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llava_keeplora.analysis.plots import draw_knowledge, draw_places
from llava_keeplora.analysis.results import PLACES, Knowledge, MethodUpdates
from llava_keeplora.analysis.svd_split import KEPT
from llava_keeplora.errors import ConfigError
from llava_keeplora.files import whole_folder, write_json
from llava_keeplora.report.capacity import layer_lines
from llava_keeplora.report.figures import LIGHT, save
from llava_keeplora.report.latex_csv import csv_table
from llava_keeplora.report.lines import draw_layer_lines
from llava_keeplora.report.overlap import draw_overlap
from llava_keeplora.report.tables import markdown_table
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.matrix import format_number

#: Columns of the table of updates.
COLUMNS = (
    "task",
    "part",
    "principal (%)",
    "earlier features (%)",
    "outside (%)",
    "principal at random (%)",
)


@contextmanager
def output_folder(into: str | Path) -> Iterator[Path]:
    """Open a temporary folder that becomes `into` when the block ends; see `whole_folder`.

    It is created before the work that fills it, so that a target that cannot be written is noticed at once.

    Raises:
        ConfigError: the folder cannot be created.
    """
    with ExitStack() as stack:
        try:
            tmp_dir = stack.enter_context(whole_folder(into, replace=False))
        except OSError as error:
            raise ConfigError(
                f"{into} cannot be a folder to write to ({error.strerror})", "choose another one with --into"
            ) from error
        yield tmp_dir


def write_knowledge(knowledge: Knowledge, into: Path) -> None:
    """Write `knowledge.json`, `.csv`, `.md`, `.png` and `.svg`."""
    write_json(into / "knowledge.json", knowledge.to_dict())
    rows = [
        [point.part, point.energy, point.side, point.directions, group, task, point.scores[task]]
        for point in knowledge.points
        for group, tasks in knowledge.tasks.items()
        for task in tasks
    ]
    write_atomic(
        into / "knowledge.csv",
        csv_table(["part", "energy", "side", "directions", "group", "task", "score"], rows),
    )
    write_atomic(into / "knowledge.md", knowledge_table(knowledge))
    save(draw_knowledge(knowledge, LIGHT), into / "knowledge")


def knowledge_table(knowledge: Knowledge) -> str:
    """Return the mean scores as a Markdown table, and the thresholds that they propose."""
    columns = [(side, group) for side in ("principal", "residual") for group in knowledge.tasks]
    rows = [
        [
            "the whole model",
            "",
            "",
            *(format_number(knowledge.mean(group, knowledge.whole), 1) for _, group in columns),
        ]
    ]
    for part in knowledge.parts:
        lines = [dict(knowledge.line(part, side, group)) for side, group in columns]
        directions = {point.energy: point.directions for point in knowledge.points if point.part == part}
        rows += [
            [
                part,
                f"{100 * p:g}",
                f"{100 * directions[p]:.0f}",
                *(format_number(line[p], 1) for line in lines),
            ]
            for p in sorted(directions)
        ]
    table = markdown_table(
        ["part", "energy (%)", "directions (%)", *(f"{group}, {side}" for side, group in columns)], rows
    )
    tasks = "".join(f"\n{group}: {', '.join(tasks)}\n" for group, tasks in knowledge.tasks.items())
    proposals = [
        f"{part} {'none of these' if value is None else f'{value:g}'}"
        for part, value in knowledge.proposals.items()
    ]
    return (
        f"{table}{tasks}\nenergy_weight that keeps {KEPT:.0%} of the general score: {', '.join(proposals)}\n"
    )


def write_updates(run: Path, updates: Mapping[str, MethodUpdates], into: Path) -> None:
    """Write `updates.json`, `.csv`, `.md`, and per method the plots `places`, `principal` and `overlap`."""
    write_json(
        into / "updates.json",
        {
            "run": run.resolve().name,
            "methods": {label: method.to_dict() for label, method in updates.items()},
        },
    )
    fields = list(next(method.updates[0] for method in updates.values()).__dataclass_fields__)
    rows = [
        [label, *(getattr(update, field) for field in fields)]
        for label, method in updates.items()
        for update in method.updates
    ]
    write_atomic(into / "updates.csv", csv_table(["method", *fields], rows))
    write_atomic(into / "updates.md", updates_table(updates))
    for label, method in updates.items():
        save(draw_places(method, label, LIGHT), into / f"places-{label}")
        save(
            draw_layer_lines(
                _lines(method), method.tasks, "share of the update in the principal subspace", LIGHT
            ),
            into / f"principal-{label}",
        )
        if method.overlap:
            save(draw_overlap(method.tasks, method.overlap, label, LIGHT), into / f"overlap-{label}")


def _lines(method: MethodUpdates):
    """Return part → layer → share in the principal subspace, task by task."""
    return layer_lines(
        [
            {
                (update.part, update.layer): update.principal
                for update in method.updates
                if update.task == task and update.principal is not None
            }
            for task in method.tasks
        ]
    )


def updates_table(updates: Mapping[str, MethodUpdates]) -> str:
    """Return Markdown tables of where each task's update of each part lies, and of the tasks' overlaps."""
    parts = []
    for label, method in updates.items():
        rows = [
            [task, part, *_percent(method.shares(part, task))]
            for task in method.tasks
            for part in method.parts
        ]
        parts.append(f"## {label}\n\n{markdown_table(COLUMNS, rows)}")
        if method.overlap:
            parts.append(
                markdown_table(
                    ["overlap", *method.tasks],
                    [
                        [task, *(format_number(value, 2) for value in row)]
                        for task, row in zip(method.tasks, method.overlap)
                    ],
                )
            )
    return "\n".join(parts)


def _percent(shares: Mapping[str, float | None]) -> list[str]:
    return [format_number(None if shares[key] is None else 100 * shares[key]) for key in (*PLACES, "random")]
