"""The state of one method of a run between its stages.

It holds the method, the layers that it changes, and its scores, and rebuilds the model from the run's files.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit, Deltas, load_deltas
from llava_keeplora.config import ALL_LINEAR, AVERAGED, MethodConfig, make_method
from llava_keeplora.files import read_tensors, write_tensors
from llava_keeplora.journal import Journal, rolled_back
from llava_keeplora.methods import Changed, Layer, Method, find_changed
from llava_keeplora.models import Inputs
from llava_keeplora.run_folder import ADAPTERS, DELTA, JOURNAL, KEPT, MATRIX, PREPARED, STATE, read_record
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora.start import Task
from llava_keeplora.steps import Budget
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import TaskData

logger = logging.getLogger(__name__)

#: Of a stage: the files that it wrote, and the `info` of its journal entry.
Outcome = tuple[list[Path], dict[str, Any]]


class MethodState:
    """A method of the run with its folder, its layers and its scores so far.

    Args:
        context: what the methods of the run share.
        config: the method's settings.
    """

    def __init__(self, context: RunContext, config: MethodConfig):
        self.context, self.config = context, config
        self.folder = context.workspace.label(config.label)
        self.method: Method = make_method(config)
        self.journal = Journal(self.folder / JOURNAL)
        if config.label in context.workspace.begun_anew():
            self.journal.forget()
        self.trainable = self.method.trainable
        self.learn_sequence()
        #: Whether its tasks are judged; a bound's are not.
        self.guarded = context.config.guard is not None and not self.method.bound
        self.averaged = config.test_prompts == AVERAGED
        # The zero-shot score depends on the prompts alone, so the first method with these prompts takes it.
        self.first_alike = context.config.first_alike(config.label)
        self.layers, self.full, self.unreachable = self._find_layers()
        names = [task.name for task in context.tasks]
        self.matrix = Matrix(names, [None] * len(names), [], self.method.bound)
        self.method.reference = context.references.get(config.label)
        #: Kind → examples that went through the model in the present stage; see `TaskContext.passes`.
        self.passes: Counter[str] = Counter()
        #: Task → examples that a second training saw in the present stage, over all processes.
        self.seen: Counter[int] = Counter()

    def learn_sequence(self) -> None:
        """Set the tasks that the method learns: those of the run without those that it has rolled back.

        A task after one that was rolled back has the place, the files and the seed that it would have had
        without it.
        """
        self.rolled_back = rolled_back(self.journal.entries)
        trainings = self.context.config.trainings(self.config.label) if self.trainable else []
        kept = [i for i, task in enumerate(self.context.tasks) if task.name not in self.rolled_back]
        self.tasks = [self.context.tasks[i] for i in kept]
        self.inputs = [self.context.inputs[i] for i in kept]
        self.trainings = [trainings[i] for i in kept] if self.trainable else []
        self.count = len(self.tasks) if self.trainable else 0
        #: Each of these tasks' place in the run's configuration, counted from 1.
        self.places = [i + 1 for i in kept]
        #: How many deltas and states the method has loaded; None if it must load them again.
        self.loaded: tuple[int, int] | None = None

    # --- names and files ---------------------------------------------------------------------------

    def name(self, index: int) -> str:
        """Return a task's name; `base` for index 0."""
        return self.tasks[index - 1].name if index else "base"

    def tag(self, index: int) -> str:
        """Return LABEL/task-NN-NAME, under which trackers show the training of a task."""
        return str(self.path(index).relative_to(self.context.workspace.root))

    def source(self, index: int) -> str | None:
        """Return what a task's update is adopted from; None for a task that is trained, and the base."""
        return self.context.config.source(self.places[index - 1]) if index else None

    def path(self, index: int, name: str = "") -> Path:
        """Return the path of a file in a task's folder."""
        return self.context.workspace.task(self.config.label, index, self.name(index)) / name

    # --- training data -----------------------------------------------------------------------------

    def training_data(self, index: int) -> TaskData:
        """Return the training data of a task, or for index 0 the method's general data."""
        return self.tasks[index - 1].train if index else self.context.general[self.config.label].data

    def training_inputs(self, index: int) -> Inputs:
        """Return the same as the model takes them."""
        return self.inputs[index - 1] if index else self.context.general[self.config.label].inputs

    def budgets(self) -> list[Budget]:
        """Return what each task's training takes, if it is trained on its own data."""
        return [
            Budget.of(training, len(inputs), self.context.world)
            for training, inputs in zip(self.trainings, self.inputs, strict=self.trainable)
        ]

    # --- layers ------------------------------------------------------------------------------------

    def _find_layers(self) -> tuple[dict[str, Layer], dict[str, nn.Module], list[str]]:
        """Return the layers to adapt, the modules to train in full, and layers that the loss cannot reach."""
        changed = (
            find_changed(type(self.method), self.config.parts, self.context.family)
            if self.trainable
            else Changed()
        )
        if changed.unreachable:
            logger.warning(
                "%s: %d layers get no gradient from this model's loss and are left out (%s, ...)",
                self.config.label,
                len(changed.unreachable),
                changed.unreachable[0],
            )
        for part in (name for name, part in self.config.parts.items() if part.targets == (ALL_LINEAR,)):
            leaves = sorted(
                {name.rpartition(".")[2] for name, layer in changed.adapted.items() if layer.part == part}
            )
            logger.info(
                "%s: %s of %s are its layers %s",
                self.config.label,
                ALL_LINEAR,
                part,
                ", ".join(leaves) or "trained in full",
            )
        return changed.adapted, changed.full, changed.unreachable

    @property
    def adapted(self) -> dict[str, nn.Linear]:
        """Full name → linear layer with an adapter."""
        return {name: layer.module for name, layer in self.layers.items()}

    def modules(self) -> dict[str, nn.Module]:
        """Return every module that this method changes, by full name."""
        return self.adapted | self.full

    # --- the model and the method after a number of tasks --------------------------------------------

    def rebuild(self, deltas: int, states: int | None = None) -> None:
        """Put the model and the method into the state after a number of tasks, from the files alone.

        Args:
            deltas: number of tasks whose deltas are added to the base weights.
            states: number of method states to load, the base's included; deltas + 1 by default.
        """
        self.context.base.apply(self.method.combine(self.deltas(deltas)))
        self.load_method(deltas, deltas + 1 if states is None else states)

    def begin(self, index: int, added: Deltas | None = None) -> None:
        """Put the model and the method into the state in which a task begins, from the files alone.

        Args:
            index: the task.
            added: layer name → what is added to the weights in addition.
        """
        learned = self.deltas(index - 1) if self.method.cumulative else []
        self.context.base.apply([*self.method.combine(learned), added or {}])
        self.load_method(index - 1, index)

    def load_method(self, deltas: int, states: int) -> None:
        """Put the method alone into the state after a number of tasks; see `rebuild`."""
        if (deltas, states) != self.loaded:
            self.method.load_state_dicts(
                [
                    self._extra_state(task) | (self._state(task) if task < states else {})
                    for task in range(deltas + 1)
                ]
            )
            self.loaded = (deltas, states)

    def _extra_state(self, task: int) -> dict[str, Tensor]:
        return read_if_there(self.path(task, KEPT))

    def _state(self, task: int) -> dict[str, Tensor]:
        return read_if_there(self.path(task, STATE))

    def deltas(self, count: int) -> list[Deltas]:
        """Return the updates of the first tasks, in order."""
        return [load_deltas(self.path(task, DELTA)) for task in range(1, count + 1)]

    def inits(self, index: int) -> dict[str, AdapterInit]:
        """Return the initial adapters of a task, as its PREPARED stage wrote them."""
        layers = read_record(self.path(index, PREPARED))["layers"]
        tensors = read_if_there(self.path(index, ADAPTERS))
        return {
            name: AdapterInit(**values, A=tensors.get(f"{name}.A"), B=tensors.get(f"{name}.B"))
            for name, values in layers.items()
        }

    # --- scores ------------------------------------------------------------------------------------

    def scored(self, index: int) -> list[Task]:
        """Return the tasks that are scored after a task, or for index 0 on the base."""
        if not index or not self.method.bound:
            return self.context.tasks
        return [self.tasks[i - 1] for i in self.method.scored(index, len(self.tasks))]

    def fill_matrix(self, index: int, scores: Mapping[str, Any]) -> None:
        """Enter the scores (task → result) that were measured after a task into the matrix."""
        for name in (task.name for task in self.scored(index) if task.name in scores):
            for row in self._rows(index):
                self.matrix.set_cell(row, name, scores[name]["score"])

    def _rows(self, index: int) -> list[int | None]:
        """Return the matrix's rows of the model after a task: its own, and those of next ones rolled back."""
        place = self.places[index - 1] if index else 0
        rows: list[int | None] = [place - 1 if index else None]
        for task in self.context.tasks[place:]:
            if task.name not in self.rolled_back:
                break
            rows.append(self.matrix.index(task.name))
        return rows

    def write_matrix(self) -> None:
        """Write the matrix with the cells filled so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.matrix.to_json(self.folder / MATRIX)


def read_if_there(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors; an empty dict if there is no file."""
    return read_tensors(path) if path.exists() else {}


def write_if_any(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, unless there are none: an empty safetensors file cannot be read back."""
    if tensors:
        write_tensors(path, tensors)
