"""One LoRA per task, kept apart: every task is trained alone from the base, and a router picks one at test.

Source: Zhao et al. 2025, https://arxiv.org/abs/2506.05453 (MR-LoRA).

Every task trains a new LoRA on the untouched base, and nothing is merged, so a task that is routed right is
answered as well as if it had been learned alone. `routing` says what picks the task of an example at test:

- `prototypes`: the task with the nearest prototype. Where the model has class prompts (CLIP), a task has one
  prototype per class, the mean of the base's features of the class's training images and the feature of its
  prompt, of unit length; elsewhere one, the mean over its training examples of the base's features of image
  and question: the last hidden states' means over the image tokens and over the other tokens, of unit length
  each. The nearest has the largest cosine. An example of a task that is not learned yet gets the adapter of
  the nearest one too, unless there is a `rejection`: then the base answers an example that is further from
  its nearest task than all but this share of that task's training examples are.
- `model`: the base is asked, with the image, the question and a list of the learned tasks by letter (names
  and descriptions of their recipes); where its answer names none, it answers itself. For models that write
  text. It is asked with a LoRA of the router's own, on the layers of the run's parts. After each task
  `router_examples` of its training examples are kept, drawn by the run's seed, and from the second task on
  the LoRA is trained anew from the base on those of all tasks so far, to answer with the letter (cosine,
  warm-up 0.03, no weight decay; precision, optimiser and device batches as the tasks' training). With 0
  examples nothing is trained and kept, and the untouched base is asked.
- `oracle`: the task is given, and one that is not learned yet is answered by the base: the bound of all
  routers.

The adapter is added to the output of its layers, W_0 x + s B (A x), as a server of several LoRAs adds it; a
batch is answered in one part per task that is picked in it.

Differences from the official code (https://github.com/bjzhb666/MLLM-CL):

- There every adapter answers all test sets beforehand, and the router picks one of the answers; here the
  chosen adapter alone answers.
- There the adapters are of rank 128 on all linear layers of the language model; here, of the run's parts.
- There the router's LoRA is of rank 128, alpha 256, on all linear layers of the language model, with the
  connector; here, on the run's parts, with the parts' alpha / rank. The examples kept (20), the epochs (40;
  35 for abilities), the rate (5e-6), the schedule and the batch (32) are the same by default; a small model
  needs a larger rate. There the tasks' descriptions are written by hand. For domains that router starts from
  the base with the tasks' LoRAs merged (the folder `merged0.2`, whose making is not in the repository), for
  abilities from the base, as here. Its training files are not in the repository either (on the Hub:
  MLLM-CL/MLLM-CL-ReplayData, `router_DCL` and `router_ACL`). It answers greedily with at most 16 tokens; the
  first expert in the list whose letter is anywhere in the answer is picked, and one at random where the
  answer has no letter of an expert or more than one character that is none. Here the first letter that stands
  alone counts, of at most 4 tokens, and where there is none the base answers.
- Every task keeps the router that was trained after it, because answers after that task need it; the last one
  alone is needed to go on.
- Prototypes are those of other methods: one per class as in ConDU (https://arxiv.org/abs/2503.10705), and
  means of image and text features as in DISCO (https://arxiv.org/abs/2503.12897, as released in
  https://github.com/Ghy0501/MCITlib). DISCO's features are those of a second CLIP, its released code compares
  the text alone, and its adapters are all used at once, weighted by a softmax of the cosines at temperature
  0.05; here one is used. `rejection` is in none of them; MoE-Adapters (https://arxiv.org/abs/2403.11549),
  too, leaves to the base what no task's training examples resemble, by auto-encoders.
- `distillation` is the term of KeepLoRA's preset `balanced` and no part of it: an example of a task that is
  not learned yet, which the router takes for one of a learned task, is then answered more as by the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.adapters import BaseWeights, Deltas
from llava_keeplora.methods.base import AnswerContext, Holding, Layer, MethodInfo, TaskContext
from llava_keeplora.methods.info import check_effect
from llava_keeplora.methods.kept_features import KeptFeatures, check_kept_features
from llava_keeplora.methods.model_router import RouterTraining
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.switching import ZERO3_CONFLICT, SwitchingPredictor, carrying
from llava_keeplora.methods.task_router import MODEL, PROTOTYPES, TaskRouter, check_routing
from llava_keeplora.steps import Budget
from llava_keeplora_eval.predictors import Predictor

#: Options of the training of a router.
ROUTER_OPTIONS = (
    "router_examples",
    "router_epochs",
    "router_learning_rate",
    "router_rank",
    "router_batch_size",
)


class TaskLora(KeptFeatures, SequentialLora):
    """One LoRA per task and a router as `methods/task_lora.py` describes them."""

    info = MethodInfo(
        "task-lora",
        "MLLM-CL: Continual Learning for Multimodal Large Language Models",
        "https://arxiv.org/abs/2506.05453",
        inference_cost="a pass of the base for the router, A and B of the chosen task",
        extra_parameters="A and B of every task, and its prototypes",
        mergeable=False,
        kept="prototypes: a feature per class, or one; or examples, and A and B of the router",
    )
    cumulative, separate_tasks, adopts = False, True, False
    supports_zero3, zero3_conflict = False, ZERO3_CONFLICT

    @dataclass(frozen=True)
    class Options:
        """Settings of the router.

        Args:
            routing: what picks the task of an example: `prototypes`, `model`, which is asked, or
                `oracle` for the given task.
            rejection: with `prototypes`, the largest share of a task's training examples that may be taken
                for none of its kind; an example as far away as these is answered by the base. 0 for none.
            distillation: λ, the weight of keeping the task's image features near the base's, on a model of
                two encoders (`kept_features.py`); 0 for none.
            router_examples: with `model`, number of examples that are kept of every task to train the
                router, at most all; 0 for the untouched base.
            router_epochs: passes of the router's training over all that are kept.
            router_learning_rate: its learning rate.
            router_rank: rank of its LoRA, with the parts' alpha / rank; the parts' rank when None.
            router_batch_size: examples of one of its optimiser steps.
        """

        routing: str = PROTOTYPES
        rejection: float = 0.0
        distillation: float = 0.0
        router_examples: int = 20
        router_epochs: int = 40
        router_learning_rate: float = 5e-6
        router_rank: int | None = None
        router_batch_size: int = 32

        def __post_init__(self) -> None:
            check_routing(self)
            check_kept_features(self.distillation)
            self.router_training()
            check_effect(self, ROUTER_OPTIONS, "routing", MODEL)

        def router_training(self) -> RouterTraining:
            """Return the settings of the router's training.

            Raises:
                MethodError: for settings that it cannot follow.
            """
            return RouterTraining(
                self.router_examples,
                self.router_epochs,
                self.router_learning_rate,
                self.router_rank,
                self.router_batch_size,
            )

    def __init__(self, options: TaskLora.Options):
        super().__init__(options)
        self.router = TaskRouter(options.routing, options.rejection, options.router_training())
        self.mixes = self.router.lora is not None
        self.stage_cost, self.keeps_prototypes = self.router.stage_cost, self.router.keeps_prototypes
        self.answers_from_files = self.router.answers_from_files
        self.info = self.router.described(self.info, "A and B of the chosen task", "A and B of every task")
        self.keep_features(options.distillation)

    def check_tasks(self, count: int) -> None:
        """Check that the router can name every task."""
        self.router.check_tasks(count)

    def after_task(self, ctx: TaskContext) -> None:
        """Compute the task's prototypes, or train the router."""
        self.router.after_task(ctx)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last task's prototypes, or the router."""
        return self.router.state_dict()

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the prototypes of every task, or the last router."""
        self.router.load_state_dicts(states)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the prototypes of a task, or the router."""
        return self.router.holds(ctx)

    def further_budget(self, index: int, budgets: Sequence[Budget]) -> Budget | None:
        """Return what the router's training takes."""
        lora = self.router.lora
        return lora.training.budget(index, [task.examples for task in budgets[:index]]) if lora else None

    def planned_state(self, layers: Mapping[str, Layer], tasks: int) -> dict[str, Tensor] | None:
        """Return the last router; None if none is trained."""
        lora = self.router.lora
        if lora is None:
            return None
        return {name: torch.zeros(shape) for name, shape in lora.shapes(layers).items()} if tasks > 1 else {}

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return nothing: the model stays the base, and adapters are on it while it answers alone."""
        return []

    def answer_bytes(self, dense: Mapping[str, int], delta: int, tasks: int) -> tuple[int, int]:
        """Return the bytes of every task's adapter, for answers."""
        return 0, tasks * delta

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> Predictor:
        """Return a predictor that answers with the adapter of the task that each example is routed to."""
        deltas = ctx.deltas()
        layers = {name: ctx.model.get_submodule(name) for task in deltas for name in task}
        weights = BaseWeights(layers, stacked=True)
        return SwitchingPredictor(
            predictor,
            ctx.learned,
            self.router.choose(predictor, ctx),
            lambda task: carrying(weights, deltas[task]),
        )
