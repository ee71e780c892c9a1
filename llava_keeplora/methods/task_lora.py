"""One LoRA per task, kept apart: every task is trained alone from the base, and a router picks one at test.

Source: Zhao et al. 2025, arXiv 2506.05453 (MR-LoRA).

Every task trains a new LoRA on the untouched base, and nothing is merged, so a task that is routed right is
answered as well as if it had been learned alone. `routing` says what picks the task of an example at test:

- `oracle`: the task is given, and one that is not learned yet is answered by the base: the bound of all
  routers.

The adapter is added to the output of its layers, W_0 x + s B (A x), as a server of several LoRAs adds it; a
batch is answered in one part per task that is picked in it.

Differences from the official code (bjzhb666/MLLM-CL):

- There every adapter answers all test sets beforehand, and the router picks one of the answers; here the
  chosen adapter alone answers.
- There the adapters are of rank 128 on all linear layers of the language model; here, of the run's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora.adapters import BaseWeights, Deltas
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext, MethodInfo
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.switching import BASE, SwitchingPredictor, carrying
from llava_keeplora_eval.predictors import Predictor

(ORACLE,) = ROUTINGS = ("oracle",)


class TaskLora(SequentialLora):
    """One LoRA per task and a router as `methods/task_lora.py` describes them."""

    info = MethodInfo(
        "task-lora",
        "MLLM-CL: Continual Learning for Multimodal Large Language Models",
        "https://arxiv.org/abs/2506.05453",
        task_id_at_test=True,
        inference_cost="A and B of the chosen task",
        extra_parameters="A and B of every task",
        mergeable=False,
        kept="nothing (A and B of every task are its delta)",
    )
    cumulative, separate_tasks, adopts = False, True, False
    # Processes that answer with different tasks' adapters would wait for each other's weights.
    supports_zero3 = False

    @dataclass(frozen=True)
    class Options:
        """Settings of the router.

        Args:
            routing: what picks the task of an example: `oracle`, the given task.
        """

        routing: str = ORACLE

        def __post_init__(self) -> None:
            if self.routing not in ROUTINGS:
                raise MethodError(
                    f"routing must be one of {', '.join(ROUTINGS)} (got '{self.routing}')",
                    f"set it to '{ROUTINGS[0]}'",
                )

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return nothing: the model stays the base, and adapters are on it while it answers alone."""
        return []

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> Predictor:
        """Return a predictor that answers with the adapter of the task that each example is routed to."""
        deltas = ctx.deltas()
        layers = {name: ctx.model.get_submodule(name) for task in deltas for name in task}
        weights = BaseWeights(layers, stacked=True)
        return SwitchingPredictor(predictor, self._router(ctx), lambda task: carrying(weights, deltas[task]))

    def _router(self, ctx: AnswerContext) -> Callable[[Sequence[Any]], list[int]]:
        """Return a function from examples to the task of each, `BASE` for none."""
        learned = list(ctx.learned)
        given = learned.index(ctx.task) if ctx.task in learned else BASE
        return lambda examples: [given] * len(examples)
