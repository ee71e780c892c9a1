"""The runs of a table: each has its own folder, and is a child process with `llava-keeplora train`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_keeplora.compare.table import CACHE, TUNING, Order, Table, merged
from llava_keeplora.config import ZERO_SHOT, parse_config
from llava_keeplora.files import write_bytes
from llava_keeplora.guard.verdicts import DONT_SHIP
from llava_keeplora.journal import Journal
from llava_keeplora.planned_recipes import planned_tasks, recipe_changes
from llava_keeplora.records import read_object
from llava_keeplora.run_folder import JOURNAL, MATRIX, PREPARED, RESULTS, differences, read_record, task_files
from llava_keeplora.saved_run import check_base_if_here, read_identity, run_identity, with_recorded_defaults
from llava_keeplora_recipes.strict_yaml import dump_yaml

logger = logging.getLogger(__name__)

#: Seconds between two checks of the running processes.
PAUSE = 0.1


@dataclass(frozen=True)
class Job:
    """One method with one seed on one order of tasks.

    Args:
        label: the method's label.
        folder: the run folder.
        tree: the run's configuration, as plain data.
    """

    label: str
    folder: Path
    tree: dict[str, Any]

    @property
    def config_file(self) -> Path:
        """Path of the run's configuration, next to its folder."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """Path of the run's log, next to its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that the run's results depend on.

        Raises:
            UserError: the configuration or a recipe is not valid.
        """
        return run_identity(with_recorded_defaults(parse_config(self.tree)))

    def finished(self) -> bool:
        """Return whether the folder holds this run, finished and with unchanged results."""
        results, matrix = self.folder / RESULTS, self.folder / self.label / MATRIX
        if (
            not results.is_file()
            or not matrix.is_file()
            or list(differences(read_identity(self.folder), self.identity))
        ):
            return False
        # A matrix that was changed is rebuilt from the scores by running the job again.
        return read_object(results).get("methods", {}).get(self.label, {}).get("matrix") == read_object(
            matrix
        )

    def verify(self) -> None:
        """Check every file that the run wrote, and that what it was made from is unchanged.

        Raises:
            RunError: a file was damaged, or the base, a recipe, a metric, a reader or what a task was adopted
                from has changed.
        """
        config = parse_config(self.tree)
        check_base_if_here(self.folder, config.model)
        if config.adopted:
            from llava_keeplora.adopt import check_unchanged  # imports torch, which other tables do not need

            for source, path in zip(config.adopted, task_files(self.folder / self.label, PREPARED)):
                if source:
                    recorded = read_record(path)["report"]["adopted"]
                    check_unchanged(source, recorded, path.parent.name.split("-", 2)[2], self.folder)
        for label in (ZERO_SHOT, self.label):
            journal = Journal(self.folder / label / JOURNAL)
            journal.verify()
            for task, record in zip(config.tasks, planned_tasks(journal)):
                for change in recipe_changes(task, record, journal.path.parent):
                    raise change


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Args:
        job: the run.
        reason: the last line of its log.
    """

    job: Job
    reason: str

    def __str__(self) -> str:
        return f"{self.job.folder} failed ({self.reason}), see {self.job.log}"


def make_job(
    table: Table,
    folder: str,
    order: Order,
    seed: int,
    label: str,
    settings: Mapping[str, Any],
    **sections: Any,
) -> Job:
    """Return a run of a table.

    Args:
        table: the table.
        folder: the run folder, relative to the table's.
        order: the order of tasks.
        seed: the run's seed.
        label: the method's label.
        settings: the method's settings.
        sections: sections of the configuration that only this run has.
    """
    run_folder = table.output_dir / folder
    changes = {"output_dir": str(run_folder), "seed": seed, "methods": {label: dict(settings)}, **sections}
    return Job(
        label,
        run_folder,
        merged({"base_cache": str(table.output_dir / CACHE), **order.changed(table.run)}, changes),
    )


def table_jobs(table: Table, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Job]]:
    """Return order → its runs, one per seed and method that has settings."""
    return {
        order.name: [
            make_job(table, f"{order.name}/seed-{seed}/{label}", order, seed, label, options)
            for seed in order.seeds
            for label, options in settings.items()
        ]
        for order in table.orders
    }


def tuning_jobs(table: Table) -> dict[str, list[Job]]:
    """Return label → one run for each setting to try, scored on the held-out part of the training data."""
    tuning = table.tuning
    return (
        {
            label: [
                make_job(
                    table,
                    f"{TUNING}/{label}-{number}",
                    table.tuning_order,
                    tuning.seed,
                    label,
                    merged(table.methods[label], settings),
                    data={"holdout": tuning.holdout},
                )
                for number, settings in enumerate(tuning.settings[label], start=1)
            ]
            for label in table.methods
        }
        if tuning
        else {}
    )


def run_jobs(jobs: Sequence[Job], workers: int, labels: Collection[str]) -> list[Failure]:
    """Run, or resume, all jobs that are not finished; one that fails doesn't stop the others.

    Args:
        jobs: the runs.
        workers: number of processes at a time; they divide the cores, and each gets one of several GPUs.
        labels: labels of the methods to run; runs of others are checked where they are finished.

    Returns:
        the runs that failed.

    Raises:
        RunError: a file of a run that was finished before is damaged.
    """
    waiting: deque[Job] = deque()
    for job in jobs:
        if job.finished():
            job.verify()
        elif job.label in labels:
            waiting.append(job)
    running: dict[Any, Any] = {}
    free_slots, failures, done, count = deque(range(workers)), [], 0, len(waiting)
    try:
        while waiting or running:
            while waiting and free_slots:
                job, slot = waiting.popleft(), free_slots.popleft()
                logger.info("%s: started, log in %s", job.folder, job.log)
                earlier = job.config_file.read_bytes() if job.config_file.exists() else None
                running[slot] = (job, start(job, slot, workers), time.monotonic(), earlier)
            for slot, (job, process, since, earlier) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[slot]
                free_slots.append(slot)
                done += 1
                failed = code and not (code == DONT_SHIP and job.finished())
                if failed:
                    failures.append(Failure(job, _failure_reason(job.log, code)))
                    restore(job, earlier)
                logger.info(
                    "%s: %s after %.0f s, %d of %d",
                    job.folder,
                    "failed" if failed else "done",
                    time.monotonic() - since,
                    done,
                    count,
                )
            time.sleep(PAUSE)
    finally:
        # After an interruption or an error here, let the runs finish what they are writing.
        for _, process, *_ in running.values():
            process.terminate()
        for _, process, *_ in running.values():
            process.wait()
    return failures


def start(job: Job, slot: int, workers: int) -> subprocess.Popen:
    """Start a run in a child process, as worker number `slot` of `workers`."""
    write_bytes(job.config_file, dump_yaml(job.tree).encode())
    command = [sys.executable, "-m", "llava_keeplora.cli", "train", "--config", str(job.config_file)]
    with open(job.log, "a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **_share(slot, workers)},
        )


def restore(job: Job, earlier: bytes | None) -> None:
    """Put back the configuration of an earlier run in the folder, where a run with another one has failed."""
    if earlier is not None and job.folder.exists():
        write_bytes(job.config_file, earlier)


def _share(slot: int, workers: int) -> dict[str, str]:
    """Return environment variables with a worker's share of the machine: threads, and one of several GPUs.

    `OMP_NUM_THREADS` of the user is kept.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return share | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {})


def _failure_reason(log: Path, code: int) -> str:
    """Return why a run failed: the signal, or the last line of its log, which is the error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (
        f"killed by signal {-code}"
        if code < 0
        else lines[-1].removeprefix("error: ").rstrip(".")
        if lines
        else f"exit code {code}"
    )
