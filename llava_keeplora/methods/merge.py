"""Merging without training: one LoRA per task, trained alone, and their task vectors merged into one model.

Sources: Yadav et al., NeurIPS 2023, arXiv 2306.01708 (TIES, and the mean as its baseline); Wortsman et al.,
CVPR 2022, arXiv 2109.01903 (WiSE-FT), on sequences as in Zheng et al., ICCV 2023, arXiv 2303.06628.

With W_0 the base and τ_t = s B_t A_t the update of task t:

- `mean`: every task is trained from W_0, and W = W_0 + (1/T) Σ τ_t over the T tasks learned.
- `ties`: every task is trained from W_0. Of each τ_t the entries of largest magnitude are kept, a share of
  `density`; every entry gets the sign of the kept values' sum, and the mean of those that have it.
- `wise-ft`: every task is trained from the model before it, and W_t = (1 − α) W_{t−1} + α W'_t with W'_t the
  model after its training; W_t = W_0 + α Σ τ_k. α = 1 is sequential LoRA. Published on MTIL with the whole
  model trained: α 0.8.

Nothing is computed but the merge, and the model answers at no extra cost. Every task's own update is kept, so
that the merge can be made anew after each task; `mean` and `wise-ft` export as adapters, `ties` has a full
rank and exports as a merged checkpoint.

Differences:

- From the official code of TIES (prateeky2806/ties-merging): the share that is kept is one of each parameter
  of a module, as in mergekit, and not of all parameters together, for which all task vectors would have to be
  in memory at once. An entry whose kept values sum to exactly 0 is 0; there it gets the sign of the majority
  of all entries. The factor on the result, λ, is 1, its default without validation data.
- From ZSCL's code for WiSE-FT (`--wise_merge --wise_ft_model n`): adapters instead of the whole model. There
  the start can also be the pre-trained model (`zeroshot`), which is left out, because no published figure
  uses it on a sequence.
- From all: LoRA, with the layers, ranks and training settings of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llava_keeplora.adapters import Deltas
from llava_keeplora.adapters.task_vectors import MergedDeltas, scale_deltas, ties
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import MethodInfo
from llava_keeplora.methods.seq_lora import SequentialLora

MEAN, TIES, WISE_FT = RULES = ("mean", "ties", "wise-ft")


class Merge(SequentialLora):
    """Merging of task vectors as `methods/merge.py` describes it."""

    info = MethodInfo(
        "merge",
        "TIES-Merging: Resolving Interference When Merging Models",
        "https://arxiv.org/abs/2306.01708",
        kept="nothing (A and B of every task are read from its delta)",
    )
    adopts = False

    @dataclass(frozen=True)
    class Options:
        """Settings of the merge.

        Args:
            rule: `mean`, `ties` or `wise-ft`.
            density: the share of a task vector's entries that `ties` keeps.
            alpha: α of `wise-ft`, the weight of the trained model against its start.
        """

        rule: str = MEAN
        density: float = 0.2
        alpha: float = 0.8

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

    def __init__(self, options: Merge.Options):
        super().__init__(options)
        self.cumulative = options.rule == WISE_FT

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return the merged task vectors."""
        if self.options.rule == TIES:
            return [MergedDeltas(deltas, partial(ties, density=self.options.density))]
        factor = self.options.alpha if self.options.rule == WISE_FT else 1 / max(len(deltas), 1)
        return [scale_deltas(task, factor) for task in deltas]
