"""Routing by the model itself: the untouched base is asked which task a question is of.

Source: Zhao et al. 2025, arXiv 2506.05453 (MR-LoRA), for asking the model with a list of experts by letter.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext
from llava_keeplora.methods.switching import BASE
from llava_keeplora_eval.chat import question_text

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example, Recipe

#: Length of the model's answer, of which the first letter that stands alone counts.
TOKENS = 4
ASKED = (
    "There is an expert for each kind of question about images:\n{experts}\n"
    "Which expert should answer the question below?\n{question}\n"
    "Do not answer the question. Answer with the expert's letter alone."
)


class ModelRouter:
    """Asks the untouched base for the letter of the task that an example is of.

    Args:
        ctx: the tasks learned, with the base's own predictor of short answers.
    """

    def __init__(self, ctx: AnswerContext):
        assert ctx.asking is not None
        self.recipes, self.recipe, self.predictor = ctx.recipes, ctx.recipe, ctx.asking(TOKENS)

    def __call__(self, examples: Sequence[Example]) -> list[int]:
        """Return the task of each example, 0 for the first; `BASE` where the answer names none."""
        if len(self.recipes) == 1:
            return [0] * len(examples)
        answers = self.predictor.predict([routing_example(e, self.recipe, self.recipes) for e in examples])
        return [read_letter(answer, len(self.recipes)) for answer in answers]


def routing_example(example: Example, recipe: Recipe, recipes: Sequence[Recipe]) -> Example:
    """Return an example whose question is which of the tasks it is of.

    Args:
        example: the example.
        recipe: its own task, for a question that every example shares.
        recipes: the tasks to choose from, each described by its name and its recipe's description.

    Raises:
        MethodError: there are more tasks than letters.
    """
    if len(recipes) > len(string.ascii_uppercase):
        raise MethodError(
            f"{len(recipes)} tasks are learned, and routing 'model' names them by "
            f"{len(string.ascii_uppercase)} letters",
            "set routing to 'prototypes'",
        )
    experts = "\n".join(
        f"{letter}: {' '.join(filter(None, [other.name + '.', other.description]))}"
        for letter, other in zip(string.ascii_uppercase, recipes)
    )
    question = ASKED.format(experts=experts, question=question_text(recipe, example.question))
    return dataclasses.replace(example, question=question)


def read_letter(answer: str, count: int) -> int:
    """Return which of `count` tasks the first letter that stands alone names; `BASE` if there is none."""
    letter = re.search(rf"(?<![A-Za-z])[{string.ascii_uppercase[:count]}](?![A-Za-z])", answer)
    return string.ascii_uppercase.index(letter.group()) if letter else BASE
