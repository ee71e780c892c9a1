"""LwF: learning without forgetting, distillation from the model at the task's start on the task's own inputs.

Source: Li and Hoiem, ECCV 2016 and TPAMI 2018, https://arxiv.org/abs/1606.09282.

Sequential LoRA with the loss

    task's own loss + λ · KL(softmax(Z_0 / τ) ‖ softmax(Z / τ))

where Z are the model's outputs on the batch, Z_0 those of the model at the task's start, and the mean is over
the rows: images on a model of two encoders, tokens of the answers on a model that writes text. Published with
λ 1 and τ 2.

Differences from the paper:

- There the old outputs are those of separate heads for the old tasks, whose classes the new images are
  compared with; here a model has one output, so Z and Z_0 are over the new task's classes, or over the
  vocabulary.
- There the new head is trained alone before everything is; here there is no head.
- The KL divergence has the gradient of the paper's cross-entropy, and is 0 at the task's start. As in the
  paper, it is not multiplied by τ².
- The adapters learn, as with every method here, and not the whole network.

The teacher is the model itself with its adapters switched off, so that nothing is stored; a step takes one
forward pass more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Layer, MethodInfo, TaskContext
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.task_start import TaskStart, divergence, remember_start
from llava_keeplora.run_folder import Stage


class Lwf(SequentialLora):
    """LwF as `methods/lwf.py` describes it."""

    info = MethodInfo("lwf", "Learning without Forgetting", "https://arxiv.org/abs/1606.09282")
    stage_cost = {Stage.TRAINED: 1.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of LwF; rank and alpha are the parts'.

        Args:
            strength: λ, the weight of the distillation.
            temperature: τ.
        """

        strength: float = 1.0
        temperature: float = 2.0

        def __post_init__(self) -> None:
            check_distillation(self.strength, self.temperature)

    def __init__(self, options: Lwf.Options):
        super().__init__(options)
        self.start: TaskStart | None = None

    def training_context(self, ctx: TaskContext, model: nn.Module) -> AbstractContextManager[None]:
        """Remember the model at the task's start."""
        return remember_start(self, model)

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus the distillation on the same batch."""
        if not self.options.strength:
            return out["loss"]
        with self.start.restored():
            before = ctx.forward(**batch)["logits"]
        distilled = divergence(before, out["logits"], self.options.temperature)
        return out["loss"] + self.options.strength * distilled

    def planned_state(self, layers: Mapping[str, Layer], tasks: int) -> dict[str, Tensor]:
        """Return nothing: the loss needs no earlier task."""
        return {}


def check_distillation(strength: float, temperature: float) -> None:
    """Check the settings of a distillation.

    Raises:
        MethodError: if one is out of range.
    """
    if not strength >= 0.0:
        raise MethodError(
            f"strength must not be negative (got {strength})", "set it to 0 for no distillation"
        )
    if not temperature > 0.0:
        raise MethodError(f"temperature must be above 0 (got {temperature})", "set it to 1 to leave it out")
