"""A run folder as results: matrices, protected fractions and settings, read back from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.report.page import write_report
from llava_keeplora_eval import Matrix

#: The columns that a user looks at first.
HEADLINE = ("transfer", "average", "last", "forgetting")


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
    config = json.loads((run / "config.json").read_text())
    capacity = {label: stages for label in results if (stages := read_capacity(run / label))}
    settings = {key: config[key] for key in ("seed", "sequence", "model", "parts", "training", "data")}
    settings["methods"] = {label: {"method": m["method"], **m["options"]} for label, m in config["methods"].items()}
    write_report(run, f"Run {run.name}", results, capacity, settings)
    return results


def read_results(run: Path) -> dict[str, Matrix]:
    """label → matrix of every method of a run, zero-shot first, then in the configuration's order."""
    config_file = run / "config.json"
    if not config_file.exists():
        raise RunError(f"{run} is not a run folder (it has no config.json)", "name the output_dir of a run")
    labels = ["zero-shot", *json.loads(config_file.read_text())["methods"]]
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


def summary(run: str | Path, results: dict[str, Matrix]) -> str:
    """What a run prints at its end: the matrices, the headline metrics and where everything lies."""
    run = Path(run)
    blocks = []
    for label, matrix in results.items():
        if _learned(matrix):
            blocks.append(f"{label}: accuracy in % after each task\n{matrix.markdown()}")
    lines = [f"| method | {' | '.join(name.capitalize() for name in HEADLINE)} |", "|---" * (len(HEADLINE) + 1) + "|"]
    for label, matrix in results.items():
        metrics = (matrix if _learned(matrix) else matrix.constant_zero_shot()).metrics()
        cells = ["n/a" if metrics[name] is None else f"{metrics[name]:.1f}" for name in HEADLINE]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    blocks.append("\n".join(lines))
    places = {"run folder": run, "table": run / "table.md", "page with the pictures": run / "report.html"}
    blocks.append("\n".join(f"{what}: {path}" for what, path in places.items()))
    return "\n" + "\n\n".join(blocks) + "\n"


def _learned(matrix: Matrix) -> bool:
    return any(cell is not None for row in matrix.rows for cell in row)
