"""Routing by the model itself: it is asked which task a question is of, untouched or with a LoRA of its own.

Source: Zhao et al. 2025, arXiv 2506.05453 (MR-LoRA), for asking the model with a list of experts by letter,
and for the LoRA, which is trained anew after each task to answer with the letter, on a few examples kept of
every task.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from llava_keeplora.adapters import BaseWeights, Delta
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext, Holding, Layer, TaskContext
from llava_keeplora.methods.kept_examples import KeptExamples
from llava_keeplora.methods.mixture import draw_pool
from llava_keeplora.methods.switching import BASE, carrying
from llava_keeplora.steps import Budget
from llava_keeplora_eval.chat import question_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llava_keeplora_recipes import Example, Recipe, TaskData

#: Length of the model's answer, of which the first letter that stands alone counts.
TOKENS = 4
LETTERS = string.ascii_uppercase
ASKED = (
    "There is an expert for each kind of question about images:\n{experts}\n"
    "Which expert should answer the question below?\n{question}\n"
    "Do not answer the question. Answer with the expert's letter alone."
)
#: Prefix of the router's tensors in a task's state.
ROUTER = "router"
#: The schedule of MR-LoRA's router.
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """The training of the router after each task.

    Args:
        examples: number of examples that are kept of every task, at most all.
        epochs: passes over all that are kept.
        learning_rate: its learning rate.
        rank: rank of its LoRA; that of each layer's part when None.
        batch_size: examples of an optimiser step.
    """

    examples: int
    epochs: int
    learning_rate: float
    rank: int | None
    batch_size: int

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise MethodError(
                f"router_examples must not be negative (got {self.examples})",
                "set it to 20, as published, or to 0 for a router that is not trained",
            )
        for name in ("epochs", "rank", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise MethodError(f"router_{name} must be at least 1 (got {value})", "leave it out")
        if not 0.0 < self.learning_rate < float("inf"):
            raise MethodError(
                f"router_learning_rate must be above 0 and finite (got {self.learning_rate})",
                "set it to 5e-6, as published",
            )

    def budget(self, index: int, sizes: Sequence[int]) -> Budget:
        """Return what the training after task `index` takes; nothing while there is one task to choose.

        Args:
            index: the task, counted from 1.
            sizes: number of training examples of each task up to it.
        """
        kept = sum(min(self.examples, size) for size in sizes) if index > 1 else 0
        return Budget(kept, self.batch_size, self.epochs * -(-kept // self.batch_size))


class RouterLora:
    """A LoRA with which the base answers with the letter of the task that an example is of.

    After each task some of its training examples are kept, and from the second task on the LoRA is trained
    anew on those of all tasks so far. The router that the last task left is used.

    Args:
        training: its settings.
    """

    def __init__(self, training: RouterTraining):
        self.training, self._kept = training, KeptExamples(f"{ROUTER}.examples")
        self.deltas: dict[str, Delta] = {}

    def learn(self, ctx: TaskContext) -> None:
        """Keep examples of a task and train the router; the model must be the untouched base.

        Raises:
            MethodError: the task has no training data.
        """
        assert ctx.data is not None
        self.deltas = {}
        available = len(ctx.data(ctx.index)) if ctx.index else 1
        if not available:
            raise MethodError(
                f"the router trains on examples of every task, and task '{ctx.name}' has no training data",
                "set router_examples to 0, or routing to 'oracle'",
            )
        self._kept.keep(ctx, min(self.training.examples, available) if ctx.index else 0)
        if ctx.index > 1:
            self._train(ctx)

    def _train(self, ctx: TaskContext) -> None:
        assert ctx.data is not None and ctx.fit is not None
        tasks = range(1, ctx.index + 1)
        kept = {task: ctx.data(task).take(self._kept.rows(ctx, task)) for task in tasks}
        recipes = [data.recipe for data in kept.values()]
        asked = {task: routing_data(data, recipes, task - 1) for task, data in kept.items()}
        pool = [(task, row) for task, data in asked.items() for row in range(len(data))]
        budget = self.training.budget(ctx.index, [len(data) for data in asked.values()])
        inits = {
            name: layer.adapter(self.training.rank or layer.rank, train_A=True)
            for name, layer in ctx.layers.items()
        }
        settings = {**SCHEDULE, "learning_rate": self.training.learning_rate}
        trained = ctx.fit(inits, asked, draw_pool(pool, budget, ctx.seed), settings)
        # The scale is part of B, so that the state needs no third tensor.
        self.deltas = {name: Delta(delta.A, delta.scale * delta.B, 1.0) for name, delta in trained.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept of the last task, and the router that was trained after it."""
        factors = {
            f"{ROUTER}.{name}.{factor}": value
            for name, delta in self.deltas.items()
            for factor, value in delta.tensors.items()
        }
        return self._kept.state_dict() | factors

    def load(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take over what is kept of every task, and the last one's router."""
        self._kept.load(states)
        last = states[-1] if states else {}
        names = [key[len(ROUTER) + 1 : -2] for key in last if key.endswith(".A")]
        self.deltas = {
            name: Delta(last[f"{ROUTER}.{name}.A"], last[f"{ROUTER}.{name}.B"], 1.0) for name in names
        }

    def shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, int]]:
        """Return the shapes of the router's tensors in a state."""
        shapes = {}
        for name, layer in layers.items():
            rank = self.training.rank or layer.rank
            shapes[f"{ROUTER}.{name}.A"] = (rank, layer.module.in_features)
            shapes[f"{ROUTER}.{name}.B"] = (layer.module.out_features, rank)
        return shapes

    def holds(self, ctx: TaskContext) -> dict[str, Holding]:
        """Return what a task's state holds of the router."""
        shapes = self.shapes(ctx.layers) if ctx.index > 1 else {}
        return self._kept.holds(ctx.index) | {name: Holding(shape) for name, shape in shapes.items()}


class ModelRouter:
    """Asks the model for the letter of the task that an example is of.

    Args:
        ctx: the tasks learned, with the base's own predictor of short answers.
        deltas: update that the base carries while it is asked; the untouched base is asked without one.
    """

    def __init__(self, ctx: AnswerContext, deltas: Mapping[str, Delta] | None = None):
        assert ctx.asking is not None
        self.recipes, self.recipe, self.predictor = ctx.recipes, ctx.recipe, ctx.asking(TOKENS)
        self.deltas = deltas or {}
        self.weights = BaseWeights(
            {name: ctx.model.get_submodule(name) for name in self.deltas}, stacked=True
        )

    def __call__(self, examples: Sequence[Example]) -> list[int]:
        """Return the task of each example, 0 for the first; `BASE` where the answer names none."""
        if len(self.recipes) == 1:
            return [0] * len(examples)
        asked = [routing_example(e, self.recipe, self.recipes) for e in examples]
        with carrying(self.weights, self.deltas) if self.deltas else nullcontext():
            answers = self.predictor.predict(asked)
        return [read_letter(answer, len(self.recipes)) for answer in answers]


def check_letters(tasks: int) -> None:
    """Check that there is a letter for every task.

    Raises:
        MethodError: there is none.
    """
    if tasks > len(LETTERS):
        raise MethodError(
            f"routing is 'model', which names {tasks} tasks by {len(LETTERS)} letters",
            "set it to 'prototypes'",
        )


def routing_question(recipe: Recipe, question: str | None, recipes: Sequence[Recipe]) -> str:
    """Return the question which of the tasks a question is of.

    Args:
        recipe: its own task, for a question that every example shares.
        question: the example's.
        recipes: the tasks to choose from, each described by its name and its recipe's description.

    Raises:
        MethodError: see `check_letters`.
    """
    check_letters(len(recipes))
    experts = "\n".join(
        f"{letter}: {' '.join(filter(None, [other.name + '.', other.description]))}"
        for letter, other in zip(LETTERS, recipes)
    )
    return ASKED.format(experts=experts, question=question_text(recipe, question))


def routing_example(example: Example, recipe: Recipe, recipes: Sequence[Recipe]) -> Example:
    """Return an example whose question is which of the tasks it is of; see `routing_question`."""
    return dataclasses.replace(example, question=routing_question(recipe, example.question, recipes))


def routing_data(data: TaskData, recipes: Sequence[Recipe], task: int) -> TaskData:
    """Return examples that ask which of the tasks they are of, with the letter of `task` as the answer."""
    questions = [routing_question(data.recipe, question, recipes) for question in data.questions]
    return data.with_questions(questions).with_answers([LETTERS[task]] * len(data))


def read_letter(answer: str, count: int) -> int:
    """Return which of `count` tasks the first letter that stands alone names; `BASE` if there is none."""
    letter = re.search(rf"(?<![A-Za-z])[{LETTERS[:count]}](?![A-Za-z])", answer)
    return LETTERS.index(letter.group()) if letter else BASE
