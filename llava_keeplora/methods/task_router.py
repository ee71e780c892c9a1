"""The router of methods that keep the tasks' updates apart: what picks the task of an example at test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext, Holding, MethodInfo, TaskContext
from llava_keeplora.methods.info import check_effect
from llava_keeplora.methods.model_router import ModelRouter, RouterLora, RouterTraining, check_letters
from llava_keeplora.methods.prototypes import Prototypes, check_rejection
from llava_keeplora.methods.switching import BASE
from llava_keeplora.run_folder import Stage
from llava_keeplora_eval.predictors import Predictor

(PROTOTYPES, MODEL, ORACLE) = ROUTINGS = ("prototypes", "model", "oracle")
#: The families whose models write text, and can be asked for a task.
WRITING = ("llava",)
#: Routing → what it computes at test.
COST = {PROTOTYPES: "a pass of the base for the router", MODEL: "an answer of the base for the router"}


class TaskRouter:
    """Picks the task of an example, by prototypes, the model or the oracle.

    With `prototypes` every example gets the nearest of the tasks learned, or the base where that is too far;
    with `model` the one that the base names, untouched or with the router's LoRA, and the base where it names
    none; with `oracle` the task is given, and examples of a task that is not learned get the base.

    Args:
        routing: one of `ROUTINGS`.
        rejection: see `Prototypes`.
        training: training of the router with `model`; None for the untouched base.
    """

    def __init__(self, routing: str, rejection: float, training: RouterTraining | None = None):
        self.routing, self.prototypes = routing, Prototypes(rejection)
        trained = routing == MODEL and training is not None and training.examples > 0
        #: The router's LoRA; None if nothing is trained.
        self.lora = RouterLora(training) if trained else None
        #: See `Method.stage_cost`.
        self.stage_cost = {Stage.CONSOLIDATED.value: 1.0} if routing == PROTOTYPES else {}
        #: See `Method.keeps_prototypes`.
        self.keeps_prototypes = routing == PROTOTYPES
        #: See `Method.answers_from_files`; a model that is asked needs the run's own settings of its answers.
        self.answers_from_files = routing != MODEL

    def described(self, info: MethodInfo, cost: str, parameters: str, kept: str = "nothing") -> MethodInfo:
        """Return a method's record with what the router needs, computes and keeps.

        Args:
            info: the method's record.
            cost, parameters, kept: `MethodInfo.inference_cost`, `extra_parameters` and `kept` without router.
        """
        if self.lora:
            parameters, kept = f"{parameters} and of the router", "examples, and A and B of the router"
        elif self.keeps_prototypes:
            parameters, kept = f"{parameters}, and its prototypes", "prototypes: a feature per class, or one"
        return replace(
            info,
            families=WRITING if self.routing == MODEL else info.families,
            task_id_at_test=self.routing == ORACLE,
            inference_cost=f"{COST[self.routing]}, {cost}" if self.routing in COST else cost,
            extra_parameters=parameters,
            kept=kept,
        )

    def check_tasks(self, count: int) -> None:
        """Check that the router can name every task of a run; see `check_letters`."""
        if self.routing == MODEL:
            check_letters(count)

    def after_task(self, ctx: TaskContext) -> None:
        """Compute the task's prototypes, or train the router; the model must be the untouched base."""
        if ctx.index and self.routing == PROTOTYPES:
            self.prototypes.learn(ctx)
        if self.lora:
            self.lora.learn(ctx)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the last `after_task` added."""
        return self.lora.state_dict() if self.lora else self.prototypes.state_dict()

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load what was kept of the base and every task."""
        self.prototypes = Prototypes(self.prototypes.rejection, states)
        if self.lora:
            self.lora.load(states)

    def holds(self, ctx: TaskContext) -> dict[str, Holding]:
        """Return what a task's state holds of the router."""
        if self.lora:
            return self.lora.holds(ctx)
        return self.prototypes.holds() if ctx.index and self.routing == PROTOTYPES else {}

    def choose(self, predictor: Predictor, ctx: AnswerContext) -> Callable[[Sequence[Any]], list[int]]:
        """Return a function from examples to the task of each, 0 for the first; `BASE` for none.

        Args:
            predictor: the untouched base's own.
            ctx: names the task and those learned.
        """
        if self.routing == PROTOTYPES:
            return self.prototypes.router(predictor)
        if self.routing == MODEL:
            return ModelRouter(ctx, self.lora.deltas if self.lora else None)
        learned = list(ctx.learned)
        given = learned.index(ctx.task) if ctx.task in learned else BASE
        return lambda examples: [given] * len(examples)


def check_routing(options: Any) -> None:
    """Check the options `routing` and `rejection`.

    Raises:
        MethodError: if the first is not one of `ROUTINGS`, or the second no share or not of use.
    """
    if options.routing not in ROUTINGS:
        raise MethodError(
            f"routing must be one of {', '.join(ROUTINGS)} (got '{options.routing}')",
            f"set it to '{ROUTINGS[0]}'",
        )
    check_rejection(options.rejection)
    check_effect(options, ("rejection",), "routing", PROTOTYPES)
