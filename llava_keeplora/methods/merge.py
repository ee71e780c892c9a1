"""Merging without training: one LoRA per task, trained alone, and their task vectors merged into one model.

Sources: Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708 (TIES, and the mean as its baseline);
Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903 (WiSE-FT), on sequences as in Zheng et al., ICCV
2023, https://arxiv.org/abs/2303.06628; Gao et al., ICLR 2026, https://arxiv.org/abs/2503.10705 (ConDU).

With W_0 the base and τ_t = s B_t A_t the update of task t:

- `mean`: every task is trained from W_0, and W = W_0 + (1/T) Σ τ_t over the T tasks learned.
- `ties`: every task is trained from W_0. Of each τ_t the entries of largest magnitude are kept, a share of
  `density`; every entry gets the sign of the kept values' sum, and the mean of those that have it.
- `wise-ft`: every task is trained from the model before it, and W_t = (1 − α) W_{t−1} + α W'_t with W'_t the
  model after its training; W_t = W_0 + α Σ τ_k. α = 1 is sequential LoRA. Published on MTIL with the whole
  model trained: α 0.8.
- `condu`: every task is trained from W_0. One unified change τ is kept for all tasks, and of each task a mask
  m and a factor λ (`methods/condu.py`); a new task is unified with the earlier ones as decoupled from τ. At
  test, `routing` picks a task by prototypes, asks the untouched base for it (`model`), or takes the given one
  (`oracle`), and the answer is that of
  W_0 + λ m ⊙ τ, with `oracle` of W_0 for a task not learned. It does not merge.

Nothing is computed but the merge (and prototypes), and but for `condu` the model answers at no extra cost.
With `condu` the weights are set anew for every task that is picked in a batch. Every task's own update is
kept, so that the merge can be made anew after each task; `mean` and `wise-ft` export as adapters, `ties` has
a full rank and exports as a merged checkpoint.

Differences:

- From the official code of TIES (https://github.com/prateeky2806/ties-merging): the share that is kept is one
  of each parameter of a module, as in mergekit, and not of all parameters together, for which all task
  vectors would have to be in memory at once. An entry whose kept values sum to exactly 0 is 0; there it gets
  the sign of the majority of all entries. The factor on the result, λ, is 1, its default without validation
  data.
- From ZSCL's code for WiSE-FT (`--wise_merge --wise_ft_model n`): adapters instead of the whole model. There
  the start can also be the pre-trained model (`zeroshot`), which is left out, because no published figure
  uses it on a sequence.
- From the official code of ConDU (https://github.com/zhangzicong518/ConDU): its LoRA variant has factors of
  rank 64 in the encoders' MLPs and unifies the changes of A and B; here the changes of the weights, B A, are
  unified, as in its full variant. Its printed figures on MTIL take the given task's model for tasks learned,
  and for others the mean of the logits of the base and of the four nearest tasks' models; here one task is
  picked for every example. One prompt per class makes the prototypes. The updates are kept as they are, too,
  so a run stores more than τ, masks and factors.
- From all: LoRA, with the layers, ranks and training settings of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from llava_keeplora.adapters import Deltas
from llava_keeplora.adapters.task_vectors import MergedDeltas, scale_deltas, ties
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext, Holding, MethodInfo, TaskContext
from llava_keeplora.methods.condu import Unified
from llava_keeplora.methods.info import check_effect
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.switching import ZERO3_CONFLICT, SwitchingPredictor, carrying
from llava_keeplora.methods.task_router import PROTOTYPES, TaskRouter, check_routing
from llava_keeplora_eval.predictors import Predictor

MEAN, TIES, WISE_FT, CONDU = RULES = ("mean", "ties", "wise-ft", "condu")


class Merge(SequentialLora):
    """Merging of task vectors as `methods/merge.py` describes it."""

    info = MethodInfo(
        "merge",
        "TIES-Merging: Resolving Interference When Merging Models",
        "https://arxiv.org/abs/2306.01708",
        kept="nothing (A and B of every task are read from its delta)",
        variants="`condu`: does not merge, but answers with the weights of the task that a router picks by a "
        "pass of the base, and keeps masks, factors and prototypes",
    )
    adopts, zero3_conflict = False, ZERO3_CONFLICT

    @dataclass(frozen=True)
    class Options:
        """Settings of the merge.

        Args:
            rule: `mean`, `ties`, `wise-ft` or `condu`.
            density: the share of a task vector's entries that `ties` keeps.
            alpha: α of `wise-ft`, the weight of the trained model against its start.
            routing: what picks the task of an example with `condu`: `prototypes`, `model`, which is
                asked, or `oracle` for the given task.
            rejection: with `condu` and `prototypes`, the largest share of a task's training examples that may
                be taken for none of its kind; an example as far away as these is answered by the base.
        """

        rule: str = MEAN
        density: float = 0.2
        alpha: float = 0.8
        routing: str = PROTOTYPES
        rejection: float = 0.0

        def __post_init__(self) -> None:
            if self.rule not in RULES:
                raise MethodError(
                    f"rule must be one of {', '.join(RULES)} (got '{self.rule}')", "set it to 'mean'"
                )
            if not 0.0 < self.density <= 1.0:
                raise MethodError(
                    f"density must be above 0 and at most 1 (got {self.density})",
                    "set it to 0.2, as published",
                )
            if not 0.0 <= self.alpha <= 1.0:
                raise MethodError(
                    f"alpha must be from 0 to 1 (got {self.alpha})", "set it to 0.8, as published"
                )
            check_effect(self, ("density",), "rule", TIES)
            check_effect(self, ("alpha",), "rule", WISE_FT)
            check_effect(self, ("routing", "rejection"), "rule", CONDU)
            check_routing(self)

    def __init__(self, options: Merge.Options):
        super().__init__(options)
        self.cumulative, self.supports_zero3 = options.rule == WISE_FT, options.rule != CONDU
        self.router = TaskRouter(options.routing, options.rejection) if options.rule == CONDU else None
        self.stage_cost = self.router.stage_cost if self.router else {}
        self.keeps_prototypes = self.router is not None and self.router.keeps_prototypes
        self.answers_from_files = self.router is not None and self.router.answers_from_files
        self.info = replace(self.info, mergeable=self.router is None, variants="")
        if self.router:
            self.info = self.router.described(
                self.info,
                "the weights set anew for every task that is picked",
                "one unified change, a mask and a factor of every task",
                self.info.kept,
            )
        self._unified = Unified()

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return the merged task vectors; nothing with `condu`, whose updates are on the model in answers."""
        if self.options.rule == CONDU:
            return []
        if self.options.rule == TIES:
            return [MergedDeltas(deltas, partial(ties, density=self.options.density))]
        factor = self.options.alpha if self.options.rule == WISE_FT else 1 / max(len(deltas), 1)
        return [scale_deltas(task, factor) for task in deltas]

    def check_tasks(self, count: int) -> None:
        """Check that ConDU's router can name every task."""
        if self.router:
            self.router.check_tasks(count)

    def after_task(self, ctx: TaskContext) -> None:
        """Compute the task's prototypes, if they route."""
        if self.router:
            self.router.after_task(ctx)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last task's prototypes."""
        return self.router.state_dict() if self.router else {}

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the prototypes of every task."""
        if self.router:
            self.router.load_state_dicts(states)
        if len(states) - 1 < len(self._unified):
            # A task that was taken back, or is to be learned again: another update follows in its place.
            self._unified = Unified()

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the prototypes of a task, if they route."""
        return self.router.holds(ctx) if self.router else {}

    def answer_bytes(self, dense: Mapping[str, int], delta: int, tasks: int) -> tuple[int, int]:
        """Return the bytes of ConDU's unified change, which is kept, and those of every task's update."""
        if self.router is None:
            return 0, 0
        kept, adding = Unified.bytes(dense, tasks)
        return kept, adding + tasks * delta

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> Predictor:
        """Return the model's own predictor; with `condu` one that answers with the picked task's update."""
        if self.router is None:
            return predictor
        unified = self._unify(ctx)
        return SwitchingPredictor(
            predictor,
            ctx.learned,
            self.router.choose(predictor, ctx),
            lambda task: carrying(ctx.weights, unified.decoupled(task)),
        )

    def _unify(self, ctx: AnswerContext) -> Unified:
        """Return the unified change of the tasks learned, which is kept for the next ones."""
        if len(self._unified) != len(ctx.learned):
            deltas = ctx.deltas()
            if len(self._unified) > len(deltas):
                self._unified = Unified()
            for task in deltas[len(self._unified) :]:
                self._unified.add(task)
        return self._unified
