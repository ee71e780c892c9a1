"""Checks of a run folder: every hash, every journal, and whether its files belong to the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llava_keeplora.config import ZERO_SHOT, RunConfig
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.files import left_behind
from llava_keeplora.journal import Journal, open_stages, rolled_back
from llava_keeplora.planned_recipes import planned_tasks, recipe_changes
from llava_keeplora.registries import list_plugins
from llava_keeplora.run_folder import (
    CONFIG,
    JOURNAL,
    MATRIX,
    SCHEMAS,
    SCORES,
    TRAINING,
    UNSHRUNK,
    Stage,
    differences,
    kept_recipe,
    read_record,
    read_training,
    task_files,
    task_folder,
)
from llava_keeplora.saved_run import base_changes, load_run, read_identity, run_identity
from llava_keeplora.versions import version_changes
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes.registry import PluginError
from llava_keeplora_recipes.strict_yaml import is_file_name

AGAIN = "run the same command again: it is written anew"


def examine_run(run: str | Path) -> Iterator[str | UserError]:
    """Yield a line for each check of a run; an error for everything that is damaged.

    Args:
        run: the run folder; nothing in it is changed.

    Raises:
        RunError: the folder is no run, or its configuration was damaged.
    """
    run = Path(run)
    config = load_run(run, run_plugins=False)
    yield from _plugins(run, config)
    yield from _identity(run, config)
    yield from _base(run, config)
    changes = version_changes(run)
    others = f"other versions than at its start ({', '.join(changes)}), so last digits may differ"
    yield f"libraries: {others if changes else 'as at its start'}"
    journals = []
    for label in (ZERO_SHOT, *config.methods):
        learns = label in config.methods
        try:
            journal = Journal(run / label / JOURNAL)
            yield _progress(label, journal, config, learns)
        except RunError as error:
            yield RunError(f"{run / label}: {error.problem}", error.cure)
            continue
        journals.append(journal)
        yield from _label(journal)
    for path in left_behind(run):
        yield RunError(
            f"{path} is what a killed command left", "run that command again, which removes it, or remove it"
        )
    for journal in journals[:1]:  # All methods have the same tasks.
        yield from _recipes(run, config, journal)


def _plugins(run: Path, config: RunConfig) -> Iterator[str | UserError]:
    """Check that plug-ins are installed with the sources that the run was begun with; none is executed."""
    try:
        recorded = list_plugins(read_identity(run))
    except UserError:  # `_identity` reports it.
        return
    for (_, recorded_name, source), (registry, name, _) in zip(
        recorded, list_plugins(dataclasses.asdict(config)), strict=False
    ):
        try:
            files = registry.source_files(name)
        except PluginError as error:
            yield error
            continue
        changed = sorted(file for file in {*source, *files} if source.get(file) != files.get(file))
        if changed:
            yield RunError(
                f"{', '.join(changed)} of the plug-in '{recorded_name}' is not what {run} was begun with",
                "restore it to go on, or start over in a new output_dir",
            )
        else:
            yield f"plug-in: '{recorded_name}', the same by source as in the run's record"


def _identity(run: Path, config: RunConfig) -> Iterator[UserError]:
    try:
        changes = list(differences(read_identity(run), run_identity(config)))
    except PluginError:  # `_plugins` has reported it.
        return
    except UserError as error:
        yield error
        return
    # `_plugins` reports sources; the number of processes is not recorded in the configuration.
    changed = [
        key for key, _, _ in changes if ".source." not in key and not key.endswith("examples_per_step")
    ]
    if changed:
        yield RunError(
            f"{run / CONFIG} and identity.json are of different runs ({', '.join(changed[:5])})",
            "restore both",
        )


def _base(run: Path, config: RunConfig) -> Iterator[str | UserError]:
    """Check that the base model is the one that the run was begun with."""
    if config.model.object:
        yield f"base model: an object of a program, a {config.model.object}; checked when the run goes on"
        return
    try:
        changed = base_changes(run, config.model)
    except UserError as error:
        yield error
        return
    if changed is None:
        yield f"base model: '{config.model.name_or_path}'; there is no record to check it by"
    elif changed:
        yield RunError(
            f"the base model '{config.model.name_or_path}' is not the one that {run} was begun with "
            f"({', '.join(changed)} differ)",
            "restore its files",
        )
    else:
        yield f"base model: '{config.model.name_or_path}', the same by content as in the run's record"


def _progress(label: str, journal: Journal, config: RunConfig, learns: bool) -> str:
    guarded = config.guard is not None and any(entry.stage == Stage.GUARDED for entry in journal.entries)
    remaining = open_stages(journal.entries, len(config.tasks), learns, guarded)
    where = f"next is {remaining[0][1]} of task {remaining[0][0]}" if remaining else "finished"
    return f"{label}: {len(journal.entries)} stages in its journal, {where}"


def _label(journal: Journal) -> Iterator[UserError]:
    if journal.torn:
        yield RunError(
            f"the last line of {journal.path} is torn, as a kill leaves it",
            "run the same command again: its stage runs again",
        )
    problems = list(journal.problems())
    yield from problems
    yield from _unknown_files(journal)
    if not problems:
        problems = list(_records(journal))
        yield from problems
    if not problems:
        yield from _matrix(journal)
    yield from _checkpoints(journal)


def _unknown_files(journal: Journal) -> Iterator[UserError]:
    """Report files in the folders of finished tasks that no journal lists."""
    folder, listed = journal.path.parent, journal.files()
    for closed in (entry for entry in journal.entries if entry.stage == Stage.CLOSED):
        for path in sorted(folder.glob(f"{task_folder(closed.task, '*')}/**/*")):
            if path.is_file() and str(path.relative_to(folder)) not in listed:
                yield RunError(f"{path} is in no journal", "remove it")


def _records(journal: Journal) -> Iterator[UserError]:
    """Report records that have the journal's hash but not the content that their readers need."""
    for name in journal.files():
        path = journal.path.parent / name
        if path.name in SCHEMAS:
            try:
                read_record(path)
            except RunError as error:
                yield error


def _checkpoints(journal: Journal) -> Iterator[UserError]:
    """Check the saved state of a task whose training is in progress."""
    for path in task_files(journal.path.parent, TRAINING):
        try:
            for name, expected in read_training(path)["sha256"].items():
                tensors = path.with_name(Path(name).name)
                if not tensors.is_file() or file_hash(tensors) != expected:
                    yield RunError(
                        f"{tensors} is not what {path} was written with",
                        "run the same command again: the task's training begins again",
                    )
        except RunError as error:
            yield error


def _matrix(journal: Journal) -> Iterator[UserError]:
    """Check the matrix against the scores that it is made from; it has no hash."""
    folder = journal.path.parent
    scores = [
        (entry.task, folder / name)
        for name, (entry, _) in journal.files().items()
        if Path(name).name == SCORES and UNSHRUNK not in Path(name).parts
    ]
    if not scores:
        return
    try:
        matrix = Matrix.from_json(folder / MATRIX)
        gone = rolled_back(journal.entries)
        kept = [place for place, name in enumerate(matrix.tasks) if name not in gone]
        for task, path in scores:
            after = matrix.scores_after(kept[task - 1]) if task else matrix.zero_shot or ()
            row = dict(zip(matrix.tasks, after))
            wrong = [name for name, score in read_record(path).items() if row.get(name) != score["score"]]
            if wrong:
                yield RunError(
                    f"{folder / MATRIX} has another score for task '{wrong[0]}' than {path}", AGAIN
                )
    except UserError as error:
        yield RunError(error.problem, AGAIN)


def _recipes(run: Path, config: RunConfig, journal: Journal) -> Iterator[UserError]:
    """Check that the recipes, and the run's copies of them, are those that the run was planned with."""
    for task, record in zip(config.tasks, planned_tasks(journal)):
        copy = kept_recipe(run, str(record.get("task")))
        if is_file_name(task) and not copy.is_file():
            yield RunError(
                f"{copy}, the run's own copy of the recipe {task}, is missing", "copy the recipe there"
            )
        for source in dict.fromkeys((task, str(copy)) if copy.exists() else (task,)):
            yield from recipe_changes(source, record, journal.path.parent)
