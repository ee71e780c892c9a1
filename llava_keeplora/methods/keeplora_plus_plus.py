"""KeepLoRA++: KeepLoRA whose updates grow from the first block to the last (arXiv 2606.16256).

Shallow blocks hold more of what transfers, so their updates are held smaller: the delta of block l is
multiplied by λ_l = γ + (1 − γ) l / (L − 1), in training and in what is left behind alike, ΔW_l = λ_l s B_l
A_l. Of a model of two encoders that is the vision encoder, of LLaVA the language model; λ is 1 in the text
encoder, the vision tower and the projector. l counts from the part's first adapted block to its last, L of
them; where there is one block alone, λ is 1. Everything else is KeepLoRA's, and A doesn't depend on γ.
Published: γ 0.2, the rest as KeepLoRA.

λ is part of the adapter's alpha, so that it reaches the forward pass, the delta and every export by the way
that s goes. Under Adam, which doesn't see a gradient's scale, an update is about λ_l times KeepLoRA's; under
SGD λ_l² times.

Where this differs:

- from the paper: its abstract alone was at hand, so the formula and γ are those of the authors' code; the
  text encoder's λ is that code's default, 1.
- from the official code (MaolinLuo/KeepLoRA, the revision of KeepLoRA++): that begins with B = 0 in the same
  revision, where for CLIP the one before had copied B from the gradient. Here these are two settings, `gamma`
  and `form`, whose default `delta` is B = 0. What else is the paper's and what the code's is for `preset`, as
  in KeepLoRA.
- a layer whose factor is 0, at γ = 0, is left out rather than trained without effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.keeplora import KeepLora


class KeepLoraPlusPlus(KeepLora):
    """KeepLoRA++ as `methods/keeplora_plus_plus.py` describes it."""

    info = MethodInfo(
        "keeplora++",
        "KeepLoRA++: Continual Learning with Layer-Scaled Residual Gradient Adaptation",
        "https://arxiv.org/abs/2606.16256",
        kept="a basis for every layer, at most as wide as its input",
        trained="B",
    )

    @dataclass(frozen=True)
    class Options(KeepLora.Options):
        """Settings of KeepLoRA++ beside KeepLoRA's.

        Args:
            gamma: γ, the factor of the first block; 1 is KeepLoRA.
        """

        gamma: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0.0 <= self.gamma <= 1.0:
                raise MethodError(
                    f"gamma is {self.gamma}, but the first block's share of an update lies in [0, 1]",
                    "set it to 0.2, as published",
                )

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """KeepLoRA's adapters, each with its block's λ in alpha; at γ = 0 the first block has none."""
        part = "vision" if hasattr(ctx.model, "get_text_features") else "language"
        scaled = block_factors(
            (name for name, layer in ctx.layers.items() if layer.part == part), self.options.gamma
        )
        inits = super().init_adapters(ctx)
        ctx.report["left_out"] |= {
            name: "its block's factor is 0" for name in inits if scaled.get(name) == 0.0
        }
        return {
            name: replace(init, alpha=init.alpha * factor)
            for name, init in inits.items()
            if (factor := scaled.get(name, 1.0))
        }


def block_factors(names: Iterable[str], gamma: float) -> dict[str, float]:
    """λ of each layer by its block: γ in the first one, 1 in the last, evenly rising between.

    Args:
        names: full names of a part's layers, `....layers.BLOCK....`.
        gamma: γ.
    """
    blocks = {name: int(next(filter(str.isdigit, name.split(".")))) for name in names}
    first, last = min(blocks.values(), default=0), max(blocks.values(), default=0)
    return {
        name: gamma + (1.0 - gamma) * (block - first) / (last - first) if last > first else 1.0
        for name, block in blocks.items()
    }
