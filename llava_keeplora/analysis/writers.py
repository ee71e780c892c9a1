"""An analysis as files: JSON and CSV to compute with, a table in Markdown, pictures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora.analysis.plots import PLACES, draw_knowledge, draw_places
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
from llava_keeplora_eval.matrix import shown

if TYPE_CHECKING:
    from llava_keeplora.analysis.knowledge import Knowledge
    from llava_keeplora.analysis.updates import MethodUpdates


@contextmanager
def made(into: str | Path) -> Iterator[Path]:
    """A room for the folder to write to, made before the work that fills it; see `whole_folder`.

    Raises:
        ConfigError: if it can't be.
    """
    with ExitStack() as held:
        try:
            room = held.enter_context(whole_folder(into, replace=False))
        except OSError as error:
            raise ConfigError(
                f"{into} cannot be a folder to write to ({error.strerror})", "choose another one with --into"
            ) from error
        yield room


SHARE_COLUMNS = [
    "task",
    "part",
    "principal (%)",
    "earlier features (%)",
    "outside (%)",
    "principal at random (%)",
]


def write_knowledge(found: Knowledge, into: Path) -> None:
    """`knowledge.json`, `.csv`, `.md`, `.png` and `.svg`."""
    write_json(into / "knowledge.json", found.to_dict())
    rows = [
        [point.part, point.energy, point.side, point.directions, group, task, point.scores[task]]
        for point in found.points
        for group, tasks in found.tasks.items()
        for task in tasks
    ]
    write_atomic(
        into / "knowledge.csv",
        csv_table(["part", "energy", "side", "directions", "group", "task", "score"], rows),
    )
    write_atomic(into / "knowledge.md", knowledge_table(found))
    save(draw_knowledge(found, LIGHT), into / "knowledge")


def knowledge_table(found: Knowledge) -> str:
    """The mean scores in Markdown, and the thresholds that they propose."""
    columns = [(side, group) for side in ("principal", "residual") for group in found.tasks]
    rows = [["the whole model", "", "", *(shown(found.mean(group, found.whole), 1) for _, group in columns)]]
    for part in found.parts:
        lines = [dict(found.line(part, side, group)) for side, group in columns]
        directions = {point.energy: point.directions for point in found.points if point.part == part}
        rows += [
            [part, f"{100 * p:g}", f"{100 * directions[p]:.0f}", *(shown(line[p], 1) for line in lines)]
            for p in sorted(directions)
        ]
    table = markdown_table(
        ["part", "energy (%)", "directions (%)", *(f"{group}, {side}" for side, group in columns)], rows
    )
    tasks = "".join(f"\n{group}: {', '.join(tasks)}\n" for group, tasks in found.tasks.items())
    told = [
        f"{part} {'none of these' if value is None else f'{value:g}'}"
        for part, value in found.proposals.items()
    ]
    return f"{table}{tasks}\nenergy_weight that keeps {KEPT:.0%} of the general score: {', '.join(told)}\n"


def write_updates(run: Path, found: Mapping[str, MethodUpdates], into: Path) -> None:
    """`updates.json`, `.csv`, `.md`, and per method the pictures `places`, `principal` and `overlap`."""
    write_json(
        into / "updates.json",
        {"run": run.resolve().name, "methods": {label: one.to_dict() for label, one in found.items()}},
    )
    fields = list(next(one.updates[0] for one in found.values()).__dataclass_fields__)
    rows = [
        [label, *(getattr(update, field) for field in fields)]
        for label, one in found.items()
        for update in one.updates
    ]
    write_atomic(into / "updates.csv", csv_table(["method", *fields], rows))
    write_atomic(into / "updates.md", updates_table(found))
    for label, one in found.items():
        save(draw_places(one, label, LIGHT), into / f"places-{label}")
        save(
            draw_layer_lines(_lines(one), one.tasks, "share of the update in the principal subspace", LIGHT),
            into / f"principal-{label}",
        )
        if one.overlap:
            save(draw_overlap(one.tasks, one.overlap, label, LIGHT), into / f"overlap-{label}")


def _lines(one: MethodUpdates):
    """Part → layer → share in the principal subspace, task by task."""
    return layer_lines(
        [
            {
                (update.part, update.layer): update.principal
                for update in one.updates
                if update.task == task and update.principal is not None
            }
            for task in one.tasks
        ]
    )


def updates_table(found: Mapping[str, MethodUpdates]) -> str:
    """Where each task's update of each part lies, and the tasks' overlaps, in Markdown."""
    parts = []
    for label, one in found.items():
        rows = [[task, part, *_percent(one.shares(part, task))] for task in one.tasks for part in one.parts]
        parts.append(f"## {label}\n\n{markdown_table(SHARE_COLUMNS, rows)}")
        if one.overlap:
            parts.append(
                markdown_table(
                    ["overlap", *one.tasks],
                    [
                        [task, *(shown(value, 2) for value in row)]
                        for task, row in zip(one.tasks, one.overlap)
                    ],
                )
            )
    return "\n".join(parts)


def _percent(shares: Mapping[str, float | None]) -> list[str]:
    return [shown(None if shares[key] is None else 100 * shares[key]) for key in (*PLACES, "random")]
