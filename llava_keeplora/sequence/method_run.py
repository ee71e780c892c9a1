"""The run of one method over the sequence: order of its stages, journal, and resumption."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from llava_keeplora.config import ZERO_SHOT, MethodConfig
from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import RunError
from llava_keeplora.guard.verdicts import MARKS
from llava_keeplora.journal import OUTCOMES, Entry, open_stages, shrunk
from llava_keeplora.run_folder import ROLLBACK, SCORES, STOP, THEN, Stage, differences, read_record
from llava_keeplora.sequence import auto_energy
from llava_keeplora.sequence.adoption import check_sources
from llava_keeplora.sequence.answers import predictions_path
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora.sequence.guarding import cost_of_guarding, set_aside
from llava_keeplora.sequence.memory import peak_memory
from llava_keeplora.sequence.method_state import MethodState
from llava_keeplora.sequence.passes import GRADIENT_COST
from llava_keeplora.sequence.progress import duration
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora.sequence.stages import STAGES, plan_record
from llava_keeplora.versions import worker_counts
from llava_keeplora_eval.files import file_hash

logger = logging.getLogger(__name__)

#: The text of the progress view while a stage runs.
ACTIVITY = {
    Stage.PLANNED: "planning",
    Stage.PREPARED: "preparing the adapters",
    Stage.TRAINED: "training",
    Stage.CONSOLIDATED: "protecting what it knows",
    Stage.EVALUATED: "scoring every task",
    Stage.GUARDED: "judging it",
    Stage.ROLLED_BACK: "rolling it back",
    Stage.SHRUNK: "shrinking its update",
    Stage.CLOSED: "closing",
}


class MethodRun(MethodState):
    """The run of one method over the sequence.

    Args:
        context: what the methods of the run share.
        config: the method's settings.

    Raises:
        RunError: if the folder's journal or files are damaged, or the data have changed since a task was
            planned.
    """

    def __init__(self, context: RunContext, config: MethodConfig):
        super().__init__(context, config)
        self._check_history()

    def go(self) -> None:
        """Run stage after stage, and enter each into the journal, until every task is closed."""
        self._show_matrix()
        while (todo := self._next()) is not None and not self._stopped():
            index, stage = todo
            with self.context.progress.stage(
                f"{self.config.label} {self._where(index)}: {ACTIVITY[stage]}", self._cost(index, stage)
            ):
                set_seed(stage_seed(self.context.config.seed, index, stage))
                self.passes.clear()
                self.seen.clear()
                start = time.perf_counter()
                with peak_memory(self.context.device) as peak:
                    files, info = STAGES[stage](self, index)
                self._record(index, stage, time.perf_counter() - start, files, info, peak)
            if stage == Stage.ROLLED_BACK:
                self._go_back(index)
            if stage == Stage.SHRUNK:
                set_aside(self)
                self.loaded = None
                again = [self._cost(*todo) for todo in self._open_stages() if todo[0] == index]
                self.context.progress.extend(sum(again))
            if stage == Stage.CLOSED and (index or self.config.label == ZERO_SHOT):
                self.context.progress.note(self._closing_line(index))

    def check_weights(self) -> None:
        """Check the base's weights, if nothing was computed yet, and updates that are still to be adopted.

        A start with wrong ones is refused at once.
        """
        if not self.journal.has_work:
            self.method.check_weights(self.layers)
        check_sources(self)

    def _record(
        self,
        index: int,
        stage: Stage,
        seconds: float,
        files: Sequence[Path],
        info: dict[str, Any],
        peak: dict[str, Any],
    ) -> None:
        """Enter a stage that is done into the journal, with the hashes of what it wrote."""
        peak["peak_bytes"] = self.context.most(peak["peak_bytes"])
        passes: Counter[str] = sum(all_gather_object(self.passes), Counter())
        info |= {"passes": dict(sorted(passes.items()))} if passes else {}
        seen = {str(task): count for task, count in sorted(self.seen.items())}
        info |= {"examples": seen} if seen else {}
        self.context.barrier()
        hashes = {str(path.relative_to(self.folder)): file_hash(path) for path in files}
        entry = Entry(index, stage, round(seconds, 3), hashes, info | peak | worker_counts())
        if self.context.rank == 0:
            self.journal.append(entry)
        else:
            self.journal.add(entry)
        logger.debug("%s: %s of %s done in %.1f s", self.config.label, stage, self._where(index), seconds)

    def _next(self) -> tuple[int, Stage] | None:
        return next(iter(self._open_stages()), None)

    def _open_stages(self) -> list[tuple[int, Stage]]:
        """Return the stages that are still to run."""
        return open_stages(self.journal.entries, len(self.context.tasks), self.trainable, self.guarded)

    def _stopped(self) -> bool:
        """Return whether a task broke a limit and is closed, and the guard stops the method there."""
        guard = self.context.config.guard
        entries = {(entry.task, entry.stage): entry for entry in self.journal.entries}
        return (
            guard is not None
            and guard.on_failure == STOP
            and any(
                entry.info.get(THEN) == STOP and (task, Stage.CLOSED) in entries
                for (task, stage), entry in entries.items()
                if stage == Stage.GUARDED
            )
        )

    def _go_back(self, index: int) -> None:
        """Go on from the task before one that was rolled back."""
        set_aside(self)
        self.learn_sequence()
        self._show_matrix()
        self.fill_matrix(index - 1, read_record(self.path(index - 1, SCORES)))
        if self.context.rank == 0:
            self.write_matrix()

    # --- estimates and lines for people --------------------------------------------------------------

    def _show_matrix(self) -> None:
        marks = dict.fromkeys(self.rolled_back, MARKS[ROLLBACK])
        self.context.progress.watch(self.config.label, self.matrix, marks)

    def cost_left(self) -> float:
        """Return the cost of the open stages, in forward passes of one image.

        A training step on one image counts as three.
        """
        answered = self.journal.files()
        return sum(self._cost(task, stage, answered) for task, stage in self._open_stages())

    def _cost(self, index: int, stage: Stage, answered: Container[str] | None = None) -> float:
        if stage in OUTCOMES:
            return 0
        if stage == Stage.EVALUATED:
            return self._evaluation_cost(index, self.journal.files() if answered is None else answered)
        if stage == Stage.GUARDED:
            return cost_of_guarding(self, index)
        if index == 0 and stage == Stage.CONSOLIDATED and stage in self.method.stage_cost:
            return auto_energy.cost(self.context, self.layers)
        if index == 0 or stage in (Stage.PLANNED, Stage.CLOSED):
            return 0
        # A share of an update is taken from a file.
        trains = stage == Stage.TRAINED and shrunk(self.journal.entries, index) is None
        if self.source(index) and stage != Stage.CONSOLIDATED:
            scored = sum(len(task.test) for task in self.context.tasks) if trains else 0
            return self.context.family.eval_cost * scored
        training = GRADIENT_COST * self._trained_images(index) if trains else 0
        if stage == Stage.CONSOLIDATED and self.method.mixes:
            further = self.method.further_budget(index, self.budgets())
            training = GRADIENT_COST * further.seen if further else 0
        return training + len(self.inputs[index - 1]) * self.method.stage_cost.get(stage, 0.0)

    def _evaluation_cost(self, index: int, answered: Container[str]) -> float:
        if index == 0 and self.config.label != self.first_alike:
            return 0  # The scores are copied.
        open_tasks = [
            task
            for task in self.scored(index)
            if str(predictions_path(self, index, task).relative_to(self.folder)) not in answered
        ]
        return self.context.family.eval_cost * sum(len(task.test) for task in open_tasks)

    def _trained_images(self, index: int) -> float:
        """Return how many images a task's training sees, each counted as often as it is seen."""
        budget = self.method.budget(index, self.budgets())
        return budget.steps * budget.batch

    def _where(self, index: int) -> str:
        return f"task {index}/{self.count} {self.name(index)}" if index else "before any task"

    def _closing_line(self, index: int) -> str:
        if index == 0:
            return f"{ZERO_SHOT}: {_mean(self.matrix.zero_shot):.1f} % on average over all tasks"
        place, seconds = self.places[index - 1], self.journal.entries[-1].info["seconds"]
        row = self.matrix.scores_after(place - 1)
        if self.method.bound:
            scores = [row[self.tasks.index(task)] for task in self.scored(index)]
            mean = f": {_mean(scores):.1f} % on average over the tasks that it scores" if scores else ""
            return f"{self.config.label} {self._where(index)}{mean}, in {duration(seconds)}"
        so_far = _mean([row[learned - 1] for learned in self.places[:index]])
        return (
            f"{self.config.label} {self._where(index)}: {row[place - 1]:.1f} % on it, {so_far:.1f} % on "
            f"average over the tasks so far, {_mean(row):.1f} % over all, in {duration(seconds)}"
        )

    # --- history -------------------------------------------------------------------------------------

    def _check_history(self) -> None:
        """Check that files and data are unchanged since they were written or planned, and fill the matrix."""
        try:
            self._next()
        except RunError as error:
            raise RunError(f"{self.journal.path}: {error.problem}", error.cure) from None
        set_aside(self)
        self.journal.verify()
        for entry in self.journal.entries:
            if entry.stage == Stage.PLANNED:
                self._check_plan(entry)
            elif entry.stage == Stage.EVALUATED:
                self.fill_matrix(entry.task, read_record(self.path(entry.task, SCORES)))

    def _check_plan(self, entry: Entry) -> None:
        now = json.loads(json.dumps(plan_record(self, entry.task)))
        # A plan that was made before the run was extended lists fewer tasks.
        pairs = [
            (f"task '{new['task']}'", old, new)
            for old, new in zip(entry.info.get("tasks", ()), now["tasks"], strict=False)
        ]
        for key in ("reference", "general"):
            # A finished method has not read them.
            if key in now or (key in entry.info and not self.context.finished(self.config.label)):
                pairs.append((f"the {key} data", entry.info.get(key, {}), now.get(key, {})))
        for what, old, new in pairs:
            for key, before, after in differences(old, new):
                raise RunError(
                    f"{what} has changed since {self.folder} was planned "
                    f"({key}: {before!r} → {after!r}{self._decoding_note(key, new)})",
                    "restore its data and recipe to go on, or choose another output_dir",
                )

    def _decoding_note(self, key: str, record: dict[str, Any]) -> str:
        if not key.endswith(".fingerprint"):
            return ""
        return next((task.decoding_note() for task in self.tasks if task.name == record.get("task")), "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
