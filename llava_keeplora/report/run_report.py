"""A run folder as results: matrices, protected fractions and settings, read back from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_keeplora.config import read_dumped
from llava_keeplora.errors import RunError
from llava_keeplora.report.page import write_report
from llava_keeplora.report.tables import score_rows, summary_table
from llava_keeplora_eval import Matrix


def write_run_report(run: str | Path) -> dict[str, Matrix]:
    """Write a run's tables, pictures and page into its folder.

    Args:
        run: the run folder.

    Returns:
        label → matrix, zero-shot first.

    Raises:
        RunError: if the folder holds no matrix.
    """
    run = Path(run)
    results = read_results(run)
    config = read_dumped(run)
    capacity = {label: stages for label in results if (stages := read_capacity(run / label))}
    settings = {key: config[key] for key in ("seed", "sequence", "model", "parts", "training", "data")}
    settings["methods"] = {label: {"method": m["method"], **m["options"]} for label, m in config["methods"].items()}
    scores = {label: rows for label, matrix in results.items() if (rows := read_scores(run / label, matrix.tasks))}
    write_report(run, f"Run {run.name}", results, capacity, settings, scores)
    return results


def read_results(run: Path) -> dict[str, Matrix]:
    """label → matrix of every method of a run, zero-shot first, then in the configuration's order."""
    labels = ["zero-shot", *read_dumped(run)["methods"]]
    found = {label: Matrix.from_json(run / label / "matrix.json") for label in dict.fromkeys(labels) if (run / label / "matrix.json").exists()}
    if not found:
        raise RunError(f"{run} holds no matrix yet", "run its training first")
    return found


def read_capacity(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """One dict per stage, layer → {in, k, part}: the base first, then after each task; empty for methods without one."""
    stages = []
    for path in sorted(folder.glob("task-*/consolidated.json")):
        capacity = json.loads(path.read_text()).get("capacity")
        if capacity:
            stages.append(capacity)
    return stages


def read_scores(folder: Path, tasks: list[str]) -> list[list[str]]:
    """The table of a method's scores, of the tasks' own metrics; empty before its first stage."""
    stages = [json.loads(path.read_text()) for path in sorted(folder.glob("task-*/scores.json"))]
    return score_rows(tasks, stages) if stages else []


def summary(run: str | Path, results: dict[str, Matrix]) -> str:
    """What a run prints at its end: the matrices, the headline metrics and where everything lies."""
    run = Path(run)
    blocks = [f"{label}: score in % after each task\n{matrix.markdown()}" for label, matrix in results.items() if matrix.started]
    blocks.append(summary_table(results))
    places = {"run folder": run, "table": run / "table.md", "page with the pictures": run / "report.html"}
    blocks.append("\n".join(f"{what}: {path}" for what, path in places.items()))
    return "\n" + "\n\n".join(blocks) + "\n"
