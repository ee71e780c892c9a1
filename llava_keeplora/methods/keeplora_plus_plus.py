"""KeepLoRA++: KeepLoRA with updates that are scaled up from the first block to the last.

Source: https://arxiv.org/abs/2606.16256.

Shallow blocks hold more of what transfers between tasks, so their updates are kept smaller: the delta of
block l is multiplied by λ_l = γ + (1 − γ) l / (L − 1), in training and in the result alike, ΔW_l = λ_l s B_l
A_l. In a model of two encoders this applies to the vision encoder, in LLaVA to the language model; λ is 1 in
the text encoder, the vision tower, the projector, and layers outside of blocks. l counts the part's blocks
from the first adapted one to the last, L of them; if there is only one, λ is 1. Everything else is
KeepLoRA's, and A does not depend on γ. Published: γ 0.2, the rest as KeepLoRA.

λ is part of the adapter's alpha, so that it reaches the forward pass, the delta and every export in the same
way as s. Under Adam, which ignores a gradient's scale, an update is about λ_l times KeepLoRA's; under SGD it
is λ_l² times.

Differences:

- From the paper: only its abstract was available, so the formula and γ are those of the authors' code; λ of
  the text encoder is that code's default, 1.
- From the official code (https://github.com/MaolinLuo/KeepLoRA, the revision of KeepLoRA++): for CLIP, this
  revision also starts with B = 0, while the previous one copied B from the gradient. Here these are two
  settings, `gamma` and `form`, whose default `delta` is B = 0. Other differences between paper and code are
  chosen by `preset`, as in KeepLoRA.
- A layer whose factor is 0, for γ = 0, is left out instead of trained without effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.keeplora import KeepLora
from llava_keeplora.methods.rejection import VARIANT


class KeepLoraPlusPlus(KeepLora):
    """KeepLoRA++ as `methods/keeplora_plus_plus.py` describes it."""

    info = MethodInfo(
        "keeplora++",
        "KeepLoRA++: Continual Learning with Layer-Scaled Residual Gradient Adaptation",
        "https://arxiv.org/abs/2606.16256",
        kept="a basis for every layer, at most as wide as its input",
        trained="B",
        variants=VARIANT,
    )

    @dataclass(frozen=True)
    class Options(KeepLora.Options):
        """Settings of KeepLoRA++ in addition to KeepLoRA's.

        Args:
            gamma: γ, the factor of the first block; 1 is KeepLoRA.
        """

        gamma: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0.0 <= self.gamma <= 1.0:
                raise MethodError(
                    f"gamma must be in [0, 1] (got {self.gamma})",
                    "set it to 0.2, as published",
                )

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return KeepLoRA's adapters with each block's λ in alpha; layers with λ = 0 are left out."""
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
    """Return layer name → λ of its block: γ in the first block, 1 in the last, rising linearly in between.

    Layers outside of blocks, as SigLIP's pooling head, are left out.

    Args:
        names: full names of a part's layers, `....layers.BLOCK....`.
        gamma: γ.
    """
    blocks = {name: block for name in names if (block := _block(name)) is not None}
    first, last = min(blocks.values(), default=0), max(blocks.values(), default=0)
    return {
        name: gamma + (1.0 - gamma) * (block - first) / (last - first) if last > first else 1.0
        for name, block in blocks.items()
    }


def _block(name: str) -> int | None:
    """Return the number of a layer's block: the one after `layers` or its like, else the name's first."""
    found = re.search(r"\b(?:layers?|blocks?|h)\.(\d+)\b", name) or re.search(r"(?<![^.])(\d+)(?![^.])", name)
    return int(found[1]) if found else None
