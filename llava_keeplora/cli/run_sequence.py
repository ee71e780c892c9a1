"""Functions that load the configuration that a command line names, and run it."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_keeplora.config import RunConfig
    from llava_keeplora.report.run_matrix import RunMatrix
    from llava_keeplora.run import Run


def load_run_config(args: argparse.Namespace, **direct: Any) -> RunConfig:
    """Load the configuration that a command line names.

    Args:
        args: the parsed command line.
        direct: keys that options of the command set, see `load_config`.
    """
    with without_collection():
        from llava_keeplora.config import load_config

        return load_config(
            args.config, args.overrides, data_root=args.data_root, methods=args.methods, **direct
        )


@contextmanager
def prepared_process() -> Iterator[type[Run]]:
    """Import what a run needs, without its libraries' progress bars, and end with a launcher that ends.

    Memory that is freed is kept for the next step, see `keep_freed_memory`.

    Yields:
        the class `Run`.
    """
    from llava_keeplora.bitsandbytes_import import import_bitsandbytes
    from llava_keeplora.host_memory import keep_freed_memory

    keep_freed_memory()
    with without_collection():
        import_bitsandbytes()  # Before the libraries below import it, with torch's compiler.

        import datasets
        import transformers

        from llava_keeplora.run import Run
        from llava_keeplora.sequence.launcher import stopped_with_launcher

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with stopped_with_launcher():
        yield Run


def print_summary(run: Run, scores: RunMatrix, task: str | None = None) -> int:
    """Print a run's summary, once where it has several processes, and return the guard's exit code.

    Args:
        run: the run.
        scores: its scores.
        task: the task whose verdict counts; those of all when None.
    """
    from llava_keeplora.guard import exit_code
    from llava_keeplora.report.terminal import summary, trials_of_run

    if run.is_main_process:
        sys.stdout.write(summary(run.folder, trials_of_run(run.folder, scores)))
    return exit_code(run.folder, task)


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable garbage collection while libraries are imported.

    Few of their objects are garbage, and visiting all of them at each collection takes time. They are frozen
    afterwards, so that later collections, such as the Trainer's after every task, skip them as well.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
