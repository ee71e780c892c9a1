"""The driver: runs every open stage of every task and method, as the journals list them.

Running and resuming are the same code: a stage reads what earlier stages wrote, so a run that was killed
and started again computes the very same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from llava_keeplora.adapters import BaseWeights
from llava_keeplora.config import ZERO_SHOT, MethodConfig, RunConfig
from llava_keeplora.distributed import is_main_process, main_process_first, processes_here
from llava_keeplora.files import translate_errors, write_json
from llava_keeplora.guard import run_record
from llava_keeplora.models import open_model
from llava_keeplora.objects import Objects
from llava_keeplora.plan import check_start
from llava_keeplora.precision import slow_precision
from llava_keeplora.report.run_report import report_is_current, write_run_report
from llava_keeplora.run_folder import GUARD, RESULTS
from llava_keeplora.saved_run import with_recorded_defaults
from llava_keeplora.sequence.method_run import MethodRun
from llava_keeplora.sequence.progress import Progress
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora.start import Task, check_run, load_tasks
from llava_keeplora_eval import Matrix

logger = logging.getLogger(__name__)


def run(config: RunConfig, objects: Objects = Objects()) -> dict[str, Matrix]:
    """Run, or resume, all methods of a configuration over its sequence of tasks.

    Args:
        config: the run's configuration.
        objects: what the calling program gives instead of files.

    Returns:
        label → accuracy matrix in percent, zero-shot first; tables and plots are in the run folder.

    Raises:
        UserError: for anything that a user can repair; finished stages are kept.
    """
    given = objects.given
    config = with_recorded_defaults(config)
    workspace = Workspace(config, content=given.content if given else None)
    with (
        translate_errors(workspace.root),
        given.lent() if given else nullcontext(),
        opened(workspace, objects) as context,
    ):
        methods = {
            ZERO_SHOT: MethodConfig(
                ZERO_SHOT, ZERO_SHOT, {}, config.parts, config.training, config.evaluation.test_prompts
            )
        } | config.methods
        runs = [MethodRun(context, method) for method in methods.values()]
        for method_run in runs:
            method_run.check_weights()
        # Nothing is written before every process has read and accepted the folder: a start that is refused
        # leaves it as it was.
        context.barrier()
        with main_process_first():
            if is_main_process():
                workspace.claim()
        # Copied once, before any method changes a weight: every method starts from the same base.
        context.base = BaseWeights({name: module for r in runs for name, module in r.modules().items()})
        with ExitStack() as ending:
            if given:  # The caller's model gets its own weights back.
                ending.callback(context.base.apply, [])
            context.progress = ending.enter_context(
                Progress(sum(r.cost_left() for r in runs), show=is_main_process())
            )
            for method_run in runs:
                method_run.go()
        results = {r.config.label: r.matrix for r in runs}
        if is_main_process():
            _write_results(workspace, runs, context.tasks)
        return results


@contextmanager
def opened(workspace: Workspace, objects: Objects = Objects()) -> Iterator[RunContext]:
    """Lock the run folder, check configuration and data, and load the model.

    The main process checks first, so that it alone reports an error.
    """
    config, processes = workspace.config, processes_here()
    with ExitStack() as lock:
        with main_process_first():
            if is_main_process():
                lock.enter_context(workspace.locked())
                workspace.check()
                if slow := slow_precision(config):
                    logger.warning("%s", slow)
            tasks, family = (
                load_tasks(config, objects),
                open_model(config.model, config.evaluation, objects.given),
            )
            changed = check_start(config, family, processes=processes)
            context = RunContext(config, workspace, tasks, family, objects)
            check_run(
                config,
                family,
                changed,
                tasks,
                [task.recipe for task in tasks],
                list(map(len, context.inputs)),
                context.world,
            )
        # All processes at once: with ZeRO-3 they shard the weights together.
        context.load()
        yield context


def _write_results(workspace: Workspace, runs: list[MethodRun], tasks: list[Task]) -> None:
    """Write the run's numbers into one file, and its tables and plots."""
    methods = {r.config.label: {"matrix": r.matrix.to_dict(), "metrics": r.matrix.metrics()} for r in runs}
    write_json(workspace.root / RESULTS, {"methods": methods, "tasks": [_with_notes(task) for task in tasks]})
    if workspace.config.guard is not None:
        names, labels = [task.name for task in tasks], [r.config.label for r in runs]
        write_json(workspace.root / GUARD, run_record(workspace.root, labels, names))
    for method_run in runs:
        method_run.write_matrix()
    if not report_is_current(workspace.root):
        write_run_report(workspace.root)
    for note in dropped_notes(tasks):
        logger.warning("%s", note)


def _with_notes(task: Task) -> dict:
    notes = task.notes()
    return task.record() | ({"notes": notes} if notes else {})


def dropped_notes(tasks: list[Task]) -> list[str]:
    """Return one sentence for every split from which unreadable images were left out."""
    splits = [
        (f"{task.name}/{name}", data)
        for task in tasks
        for name, data in (("train", task.train), ("test", task.test))
    ]
    return [
        f"{where}: {_images(len(data.dropped))} left out of {len(data) + len(data.dropped)} "
        f"({', '.join(data.dropped[:3])})"
        for where, data in splits
        if data.dropped
    ]


def _images(count: int) -> str:
    return "1 unreadable image was" if count == 1 else f"{count} unreadable images were"
