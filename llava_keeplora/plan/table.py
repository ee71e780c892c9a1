"""A plan as plain text, for the terminal."""

from __future__ import annotations

import json
import shlex
from typing import Any

from llava_keeplora.plan.machine import GB
from llava_keeplora.plan.plan import Changes, Plan
from llava_keeplora.plan.workload import ASSUMED


def describe(plan: Plan) -> str:
    """Format a plan as plain-text tables.

    The first has the memory of every stage with a verdict, the second parameters and disk space, the third
    the steps, in one column for methods that take the same.
    """
    lines = [
        f"planned for {plan.machine}, {plan.machine.available / GB:.1f} GB of it for the run; "
        f"the model takes {plan.model / GB:.2f} GB",
        "",
    ]
    on_gpu = plan.machine.gpus > 0
    rows = [["method", "stage", "GB per GPU" if on_gpu else "GB", *["host GB"] * on_gpu, "verdict"]]
    for method in plan.methods:
        for stage in method.stages:
            verdict = (
                "fits"
                if stage.fits
                else "does not fit"
                + (f"; fits with {changes_text(stage.changes)}" if stage.changes is not None else "")
            )
            rows.append(
                [
                    method.label,
                    stage.stage,
                    f"{stage.device / GB:.2f}",
                    *[f"{stage.host / GB:.2f}"] * on_gpu,
                    verdict,
                ]
            )
    lines += _aligned(rows)
    lines += [f"not planned: '{label}' {why}" for label, why in plan.left_out.items()]
    lines += [
        f"note: '{method.label}': {note}"
        for method in plan.methods
        for note in (method.unsure, method.reading, method.uncounted)
        if note
    ]
    if plan.assumed:
        lines.append(
            f"note: how many examples these tasks have is assumed, {ASSUMED['train']:,} to learn and "
            f"{ASSUMED['test']:,} to answer, since their data are not there and their recipes do not say it "
            f"(--data-root counts them): {', '.join(plan.assumed)}"
        )
    lines.append("")
    rows = [
        ["method", "trained", "stored per task", "MB on disk per task", "MB before the first task", "steps"]
    ]
    for method in plan.methods:
        mb = (f"{method.disk_task / 1e6:.1f}", f"{method.disk_base / 1e6:.1f}")
        rows.append(
            [method.label, f"{method.trainable:,}", f"{method.stored:,}", *mb, f"{sum(method.steps):,}"]
        )
    lines += [*_aligned(rows), ""]
    return "\n".join([*lines, *_aligned(_step_rows(plan))]) + "\n"


def _step_rows(plan: Plan) -> list[list[str]]:
    """Return the table of the tasks' examples and steps, in one column for methods that take the same."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for method in plan.methods:
        alike.setdefault(method.steps, []).append(method.label)
    rows = [["task", "examples", *map(_steps_title, alike.values())]]
    for i, (task, examples) in enumerate(zip(plan.tasks, plan.examples, strict=True)):
        mark = " (assumed)" * (task in plan.assumed)
        rows.append([task, f"{examples:,}{mark}", *(f"{steps[i]:,}" for steps in alike)])
    return rows


def _steps_title(labels: list[str]) -> str:
    """Return the title of the column of methods that take the same steps."""
    others = f" and {len(labels) - 1} more" if len(labels) > 2 else ""
    return f"steps of {', '.join(labels[: 1 if others else 2])}{others}"


def refusal(plan: Plan) -> tuple[str, str] | None:
    """Return what does not fit and the cure, as two halves of an error; None where everything fits."""
    short = [
        (stage.device, method.label, stage.stage)
        for method in plan.methods
        for stage in method.stages
        if not stage.fits
    ]
    if not short:
        return None
    need, label, stage = max(short)
    verb = "stages do" if len(short) > 1 else "stage does"
    what = (
        f"{len(short)} {verb} not fit {plan.machine}, most of all '{stage}' of {label} with "
        f"{need / GB:.1f} GB"
    )
    if plan.changes is None:
        return what, "none of the settings tried makes it fit: take a smaller model or more memory"
    return what, f"set {changes_text(plan.changes)}"


def changes_text(changes: Changes) -> str:
    """Format changes as arguments of the command line."""
    return " ".join(
        f"--gpus {value}" if key == "gpus" else shlex.quote(f"{key}={_yaml(value)}")
        for key, value in changes.items()
    )


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
