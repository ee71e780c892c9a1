"""A task that every method of a run has rolled back comes to the run's end, to be learned once more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from llava_keeplora.config import ZERO_SHOT, RunConfig
from llava_keeplora.distributed import is_main_process
from llava_keeplora.errors import RunError
from llava_keeplora.files import translate_errors
from llava_keeplora.journal import Entry, Journal, retried, rolled_back
from llava_keeplora.planned_recipes import planned_tasks
from llava_keeplora.run_folder import JOURNAL, RETRIED, Stage
from llava_keeplora.saved_run import followed_by, run_identity
from llava_keeplora.sequence.guarding import move_aside
from llava_keeplora.sequence.workspace import Workspace


def put_back(config: RunConfig, name: str, arguments: Mapping[str, float] | None = None) -> RunConfig:
    """Move a task that was rolled back to the end of its run, and return the run's configuration.

    Its journals and its configuration are rewritten in the main process. Nothing changes if a killed start
    has done so and the task is being learned.

    Args:
        config: the run's.
        name: the task's name.
        arguments: arguments of `PER_TASK` of that task alone; others are the same for every task.

    Raises:
        RunError: the run has no such task, or a method has not rolled it back; or see `followed_by`.
    """
    names, workspace = run_identity(config)["tasks"], Workspace(config)
    if name not in names:
        raise RunError(
            f"{config.output_dir} has no task '{name}' ({', '.join(names)})",
            "name one that was rolled back with --retry, or a new one with --task",
        )
    place, journals = names.index(name), {}
    with translate_errors(workspace.root), workspace.locked() if is_main_process() else nullcontext():
        for label in (ZERO_SHOT, *config.methods):
            journals[label] = Journal(workspace.label(label) / JOURNAL)
        learned = [label for label in config.methods if name not in _gone(journals[label])]
        if learned:
            raise RunError(
                f"'{learned[0]}' has not rolled '{name}' back",
                "fork the run before that task, to learn it otherwise",
            )
        pending = [label for label, journal in journals.items() if _is_pending(journal, name)]
        if not pending and place == len(names) - 1:
            return followed_by(config, config.tasks[place], arguments)  # A killed start goes on.
        kept = [other for other in range(len(names)) if other != place]
        config = config.of_tasks(kept).followed_by(config.tasks[place], arguments, config.source(place + 1))
        if is_main_process():
            Workspace(config).write()
            for label in pending:
                move_aside(workspace.label(label), journals[label])
                journals[label].append(Entry(0, Stage.RETRIED, info={RETRIED: name}))
    return config


def _gone(journal: Journal) -> list[str]:
    """Return the tasks that a method has rolled back, those that come once more included."""
    return [*rolled_back(journal.entries), *retried(journal.entries)]


def _is_pending(journal: Journal, name: str) -> bool:
    """Return whether a journal does not say yet that a task comes once more."""
    planned = [record.get("task") for record in planned_tasks(journal)]
    return name in rolled_back(journal.entries) or (name in planned and planned[-1] != name)
