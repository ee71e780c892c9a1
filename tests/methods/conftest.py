"""Routed methods that have learned two tasks without a run: everything trainable is moved from where it starts by noise."""

import dataclasses

import pytest
import torch

from llava_keeplora.config import ModelConfig
from llava_keeplora.methods import AnswerContext, TaskContext
from llava_keeplora.models import Prepared, load_model
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture(scope="module")
def family(tiny_clip):
    """The random CLIP, nothing on it."""
    return load_model(ModelConfig(str(tiny_clip)))


@pytest.fixture(scope="module")
def data(tiny_tasks):
    """The training splits of the three tasks."""
    return [load_split(load_recipe(str(path)), "train") for path in tiny_tasks]


def everything(family, data):
    """A task's data as one batch."""
    return family.inputs(data, Prepared(family, data)).collate(range(len(data)))


@pytest.fixture(scope="module")
def contexts(family, data):
    """Function (task from 1) → what a method may look at."""

    def build(index):
        batch = everything(family, data[index - 1])
        return TaskContext(
            index,
            data[index - 1].recipe.name,
            {},
            None,
            None,
            index,
            0,
            batches=lambda: iter([batch]),
            model=family.model,
        )

    return build


@dataclasses.dataclass
class Taught:
    """A method after two tasks.

    Args:
        method: as a run holds it when it evaluates.
        family, data: the model and the tasks' training data.
    """

    method: object
    family: object
    data: list

    def predictor(self, task, base=False):
        """What answers a task's training examples; by the frozen CLIP alone for the base."""
        own = self.data[task]
        plain = self.family.predictor(own.recipe, Prepared(self.family, own))
        ctx = AnswerContext(own.recipe.name, [data.recipe.name for data in self.data[:2]], list, None, None)
        return plain if base else self.method.predictor_of(plain, ctx)

    def logits(self, task, rows=None, base=False):
        """Of a task's training examples."""
        return self.predictor(task, base).logits(
            [self.data[task][i] for i in (range(len(self.data[task])) if rows is None else rows)]
        )


@pytest.fixture(scope="module")
def teach(family, data, contexts):
    """Function (method) → `Taught`: the hooks of two tasks, in the driver's order."""

    def run(method):
        generator = torch.Generator().manual_seed(0)
        method.load_state_dicts([{}])
        for index in (1, 2):
            torch.manual_seed(index)
            with method.training_context(contexts(index), family.model):
                with torch.no_grad():
                    for p in (p for p in family.model.parameters() if p.requires_grad):
                        p += 0.3 * torch.randn(p.shape, generator=generator)
                for value in method.progress().values():
                    value += torch.randint(9, value.shape, generator=generator)
                kept = method.extra_state()
            method.load_state_dicts([*method.states, kept])
            method.after_task(contexts(index))
        return Taught(method, family, data)

    return run


@pytest.fixture(scope="module")
def batch_of(family, data):
    """Function (task from 0) → its training data as one batch."""
    return lambda task: everything(family, data[task])
