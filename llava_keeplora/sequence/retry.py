"""A task that every method of a run has rolled back comes to the run's end, to be learned once more."""

from __future__ import annotations

from collections.abc import Mapping

from llava_keeplora.config import ZERO_SHOT, RunConfig
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

    Its journals and its configuration are rewritten, so that one process alone may call this. Nothing changes
    if a killed start has done so and the task is being learned.

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
    at_end = place == len(names) - 1
    with translate_errors(workspace.root), workspace.locked():
        for label in (ZERO_SHOT, *config.methods):
            journals[label] = Journal(workspace.label(label) / JOURNAL)
        learned = [label for label in config.methods if not _is_gone(journals[label], name, at_end)]
        if learned:
            raise RunError(
                f"'{learned[0]}' has not rolled '{name}' back",
                "fork the run before that task, to learn it otherwise",
            )
        pending = [label for label, journal in journals.items() if _is_pending(journal, name)]
        if not pending and at_end:
            return followed_by(config, config.tasks[place], arguments)  # A killed start goes on.
        kept = [other for other in range(len(names)) if other != place]
        config = config.of_tasks(kept).followed_by(config.tasks[place], arguments, config.source(place + 1))
        Workspace(config).write()
        for label in pending:
            move_aside(workspace.label(label), journals[label])
            journals[label].append(Entry(0, Stage.RETRIED, info={RETRIED: name}))
    return config


def _is_gone(journal: Journal, name: str, at_end: bool) -> bool:
    """Return whether a method has rolled a task back, or a start has put it back as the run's last one.

    A task that was put back and is not the last one any more has been learned since.
    """
    return name in rolled_back(journal.entries) or (at_end and name in retried(journal.entries))


def _is_pending(journal: Journal, name: str) -> bool:
    """Return whether a journal does not say yet that a task comes once more."""
    planned = [record.get("task") for record in planned_tasks(journal)]
    return name in rolled_back(journal.entries) or (name in planned and planned[-1] != name)
