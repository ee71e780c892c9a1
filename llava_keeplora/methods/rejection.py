"""A merged model that leaves to the untouched base what resembles no learned task.

What was learned changes the answers on other images as well, those of tasks to come among them. With
`rejection: q` the base answers an example whose features are further from the nearest learned task than
those of all but a share q of that task's training examples are, as if nothing had been learned; the merged
model answers all others. Features and distances are those of `prototypes.py`, of the untouched base, so that
what is recognised does not move while tasks are learned. Training is the same with and without it.

What it takes: the base's weights beside the merged ones, a pass of the base for every example at test (two
for one that it answers), and prototypes, so that the result is no longer one set of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llava_keeplora.methods.base import AnswerContext, Holding, MethodInfo, TaskContext
from llava_keeplora.methods.protecting import ProtectingMethod
from llava_keeplora.methods.prototypes import Prototypes
from llava_keeplora.methods.switching import BASE, route_names
from llava_keeplora.run_folder import Stage
from llava_keeplora_eval.predictors import Predictor

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example

#: See `MethodInfo.variants`.
VARIANT = "`rejection`: does not merge, as the base answers what resembles no learned task"
#: See `Method.zero3_conflict`.
ZERO3_CONFLICT = (
    "answers with the base or with what was learned, where shards need all processes to answer alike"
)


class RejectingMethod(ProtectingMethod):
    """Base class of methods whose merged model may leave examples to the base."""

    def __init__(self, options: Any):
        super().__init__(options)
        self.prototypes = Prototypes()

    def reject(self, share: float) -> None:
        """Set the share of a task's own examples that may be left to the base; in a method's `__init__`."""
        self.prototypes = Prototypes(share)
        self.info = replace(self.info, variants="")
        if not share:
            return
        self.keeps_prototypes, self.answers_from_files = True, True
        self.adopts, self.supports_zero3 = False, False
        self.zero3_conflict = ZERO3_CONFLICT
        consolidated = self.stage_cost.get(Stage.CONSOLIDATED, 0.0) + 1.0
        self.stage_cost = self.stage_cost | {Stage.CONSOLIDATED: consolidated}
        own = self.info
        self.info = replace(
            own,
            inference_cost=_with(
                own.inference_cost, "a pass of the base, which tells whether the merged model answers"
            ),
            extra_parameters=_with(
                own.extra_parameters, "the merged weights beside the base's, and prototypes"
            ),
            mergeable=False,
            kept=f"{self.info.kept}, and prototypes: a feature per class, or one",
        )

    def learn_prototypes(self, ctx: TaskContext) -> None:
        """Add a finished task's prototypes, if examples are rejected; at the end of `after_task`."""
        if ctx.index and self.prototypes.rejection:
            assert ctx.weights is not None
            with ctx.weights().untouched():
                self.prototypes.learn(ctx)

    def load_prototypes(self, states: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Load the prototypes of every task, and return the states without them."""
        self.prototypes = Prototypes(self.prototypes.rejection, states)
        own = set(self.prototypes.holds())
        return [{key: tensor for key, tensor in state.items() if key not in own} for state in states]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the last `after_task` added, prototypes included."""
        return super().state_dict() | self.prototypes.state_dict()

    def prototype_holding(self, ctx: TaskContext) -> dict[str, Holding]:
        """Return the prototypes that a task's state holds."""
        return self.prototypes.holds() if ctx.index and self.prototypes.rejection else {}

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> Predictor:
        """Return the method's predictor, or one that leaves to the base what it rejects."""
        if not self.prototypes.rejection:
            return super().predictor_of(predictor, ctx)
        # Each has what it caches of the weights for itself.
        base, merged = copy.copy(predictor), super().predictor_of(copy.copy(predictor), ctx)
        return RejectingPredictor(
            base, merged, ctx.learned, self.prototypes.router(predictor), ctx.weights.untouched
        )


def _with(own: str, more: str) -> str:
    """Return a cost of a method's own with a further one."""
    return more if own == MethodInfo.inference_cost else f"{own}; {more}"


class RejectingPredictor:
    """Answers with the base what is routed to it, and with the model as it is all else.

    Args:
        base: the base's predictor, for weights that carry nothing.
        merged: the predictor of what was learned.
        learned: names of the tasks learned, in order.
        choose: examples → the nearest task of each, `BASE` for the base; for weights that carry nothing.
        untouched: returns a context in which the weights carry nothing.
    """

    def __init__(
        self,
        base: Predictor,
        merged: Predictor,
        learned: Sequence[str],
        choose: Callable[[Sequence[Example]], list[int]],
        untouched: Callable[[], AbstractContextManager[None]],
    ):
        self.base, self.merged, self.learned = base, merged, learned
        self.choose, self.untouched = choose, untouched
        #: See `Predictor`; the merged model answers for every task that is named.
        self.routed_to: list[str | None] = []

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """Return one text per example, in order."""
        answers = [""] * len(examples)

        def answer(predictor: Predictor, rows: list[int]) -> None:
            for row, text in zip(rows, predictor.predict([examples[row] for row in rows]) if rows else ()):
                answers[row] = text

        with self.untouched():
            chosen = self.choose(examples)
            self.routed_to = route_names(chosen, self.learned)
            answer(self.base, [row for row, task in enumerate(chosen) if task == BASE])
        answer(self.merged, [row for row, task in enumerate(chosen) if task != BASE])
        return answers
