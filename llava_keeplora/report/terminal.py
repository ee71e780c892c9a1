"""The summary that a run and the command `report` print at their end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_keeplora.guard.verdicts import read_marks
from llava_keeplora.report.adopted import adopted_lines
from llava_keeplora.report.results import Results, Trial, matrices, row_marks
from llava_keeplora.report.run_report import room_line
from llava_keeplora.report.tables import markdown_table, of_seeds, summary_table
from llava_keeplora.report.watched import read_watched, stage_table
from llava_keeplora.report.write_report import DOCUMENTS
from llava_keeplora.run_folder import CONFIG
from llava_keeplora_eval import Matrix


def trials_of_run(run: Path, scores: Mapping[str, Matrix]) -> dict[str, list[Trial]]:
    """Return name → the one trial of a run's method, with what `summary` shows.

    Args:
        run: the run folder.
        scores: label → matrix.
    """
    return {
        label: [
            Trial(
                matrix,
                folder=run / label,
                marks=read_marks(run / label, matrix.tasks),
                watched=read_watched(run / label, matrix.tasks),
            )
        ]
        for label, matrix in scores.items()
    }


def summary(where: str | Path, results: Results) -> str:
    """Return the text that a run and the command `report` print at their end.

    It has the matrices of single trials, what a guard watches, the headline metrics, the tasks that each
    method still has capacity for, and the paths of the folder, the table and the HTML page.

    Args:
        where: the folder of the report.
        results: name → trials, one per seed.
    """
    where, blocks = Path(where), []
    for name, trials in results.items():
        if len(trials) == 1 and trials[0].matrix.started:
            table = trials[0].matrix.markdown(marks=row_marks(trials))
            blocks.append(f"{name}: score in % after each task\n{table}")
        if (stages := stage_table(trials))[1]:
            title = f"{name}{of_seeds(trials)}: score in % on what the guard watches"
            blocks.append(f"{title}\n{markdown_table(*stages)}")
    blocks.append(summary_table(matrices(results)))
    single = {name: trials[0].folder for name, trials in results.items() if len(trials) == 1}
    folders = {name: folder for name, folder in single.items() if folder}
    adopted = [line for name, folder in folders.items() for line in adopted_lines(name, folder)]
    blocks += ["\n".join(adopted)] * bool(adopted)
    forecasts = [line for name, folder in folders.items() if (line := room_line(name, folder))]
    blocks += ["\n".join(forecasts)] * bool(forecasts)
    paths = {
        "run folder" if (where / CONFIG).exists() else "folder": where,
        "table": where / DOCUMENTS["table"],
        "HTML report": where / DOCUMENTS["html"],
    }
    blocks.append("\n".join(f"{what}: {path}" for what, path in paths.items()))
    return "\n" + "\n\n".join(blocks) + "\n"
