"""One LoRA per task, kept apart: every task is trained alone from the base, and a router picks one at test.

Source: Zhao et al. 2025, arXiv 2506.05453 (MR-LoRA).

Every task trains a new LoRA on the untouched base, and nothing is merged, so a task that is routed right is
answered as well as if it had been learned alone. `routing` says what picks the task of an example at test:

- `prototypes`: the task with the nearest prototype. Where the model has class prompts (CLIP), a task has one
  prototype per class, the mean of the base's features of the class's training images and the feature of its
  prompt, of unit length; elsewhere one, the mean over its training examples of the base's features of image
  and question: the last hidden states' means over the image tokens and over the other tokens, of unit length
  each. The nearest has the largest cosine. An example of a task that is not learned yet gets the adapter of
  the nearest one too.
- `model`: the untouched base is asked, with the image, the question and a list of the learned tasks by letter
  (names and descriptions of their recipes); where its answer names none, it answers itself. For models that
  write text.
- `oracle`: the task is given, and one that is not learned yet is answered by the base: the bound of all
  routers.

The adapter is added to the output of its layers, W_0 x + s B (A x), as a server of several LoRAs adds it; a
batch is answered in one part per task that is picked in it.

Differences from the official code (bjzhb666/MLLM-CL):

- There every adapter answers all test sets beforehand, and the router picks one of the answers; here the
  chosen adapter alone answers.
- There the adapters are of rank 128 on all linear layers of the language model; here, of the run's parts.
- There the model routes with a LoRA of its own (rank 128, alpha 256, all linear layers of the language model,
  and the connector; learning rate 5e-6, cosine, warm-up 0.03, batch 32), trained anew on 20 examples kept of
  every task for 40 epochs (35 for abilities) to answer with the expert's letter, from descriptions written by
  hand; for domains it starts from the base with the tasks' LoRAs merged (the folder `merged0.2`, whose
  making is not in the repository), for abilities from the base. Its training files are not there either
  (on the Hub: MLLM-CL/MLLM-CL-ReplayData, `router_DCL` and `router_ACL`). It answers greedily with at most
  16 tokens; the first expert in the list whose letter is anywhere in the answer is picked, and one at random
  where the answer has no letter of an expert or more than one character that is none. Here the first letter
  that stands alone counts, of at most 4 tokens, and where there is none the base answers. `model` here is not
  trained and keeps no example, so expect less of it than published: a second training after each task, with
  an adapter, a rate and batches of its own, is no part of a method here.
- Prototypes are those of other methods: one per class as in ConDU (arXiv 2503.10705), and means of image and
  text features as in DISCO (arXiv 2503.12897, as released in Ghy0501/MCITlib). DISCO's features are those of
  a second CLIP, its released code compares the text alone, and its adapters are all used at once, weighted by
  a softmax of the cosines at temperature 0.05; here one is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llava_keeplora.adapters import AdapterInit, BaseWeights, Deltas
from llava_keeplora.methods.base import AnswerContext, Holding, MethodInfo, TaskContext
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.switching import ZERO3_CONFLICT, SwitchingPredictor, carrying
from llava_keeplora.methods.task_router import ORACLE, PROTOTYPES, TaskRouter, check_routing
from llava_keeplora_eval.predictors import Predictor


class TaskLora(SequentialLora):
    """One LoRA per task and a router as `methods/task_lora.py` describes them."""

    info = MethodInfo(
        "task-lora",
        "MLLM-CL: Continual Learning for Multimodal Large Language Models",
        "https://arxiv.org/abs/2506.05453",
        inference_cost="a pass of the base for the router, A and B of the chosen task",
        extra_parameters="A and B of every task, and its prototypes",
        mergeable=False,
        kept="prototypes: a feature per class, or one",
    )
    cumulative, separate_tasks, adopts = False, True, False
    supports_zero3, zero3_conflict = False, ZERO3_CONFLICT

    @dataclass(frozen=True)
    class Options:
        """Settings of the router.

        Args:
            routing: what picks the task of an example: `prototypes`, `model`, which is asked, or
                `oracle` for the given task.
        """

        routing: str = PROTOTYPES

        def __post_init__(self) -> None:
            check_routing(self.routing)

    def __init__(self, options: TaskLora.Options):
        super().__init__(options)
        self.router = TaskRouter(options.routing)
        self.stage_cost, self.keeps_prototypes = self.router.stage_cost, self.router.keeps_prototypes
        self.info = replace(self.info, task_id_at_test=options.routing == ORACLE)

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return a new adapter for every layer."""
        self.router.check(ctx)
        return super().init_adapters(ctx)

    def after_task(self, ctx: TaskContext) -> None:
        """Compute the task's prototypes, if they route."""
        self.router.after_task(ctx)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last task's prototypes."""
        return self.router.state_dict()

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the prototypes of every task."""
        self.router.load_state_dicts(states)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the prototypes of a task, if they route."""
        return self.router.holds(ctx)

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
            predictor, self.router.choose(predictor, ctx), lambda task: carrying(weights, deltas[task])
        )
