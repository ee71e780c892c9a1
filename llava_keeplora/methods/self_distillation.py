"""Self-distillation: distillation from the model at the task's start, on answers that it wrote itself.

Source: the idea is that of SDFT, Shenfeld et al. 2026, https://arxiv.org/abs/2601.19897 (in TRL:
`trl.experimental.sdft`). This is the plain form that is LwF with the model's own answers in the place of the
given ones.

Before a task, the model answers the task's training questions, as it answers tests. Then it trains as
sequential LoRA with the loss

    task's own loss + λ · KL(softmax(Z_0 / τ) ‖ softmax(Z / τ))

where Z are the outputs at the tokens of its own answers to a batch of these questions, Z_0 those of the model
at the task's start, and the mean is over the batch's tokens. So it is held where it would have gone, and not
only along the given answers, as with `lwf`.

Differences from the paper:

- SDFT has no other loss: its teacher has seen the given answer in its prompt, and the student learns the task
  from the teacher alone. Here the teacher has not seen it, and the task is learned by its own loss.
- SDFT lets the student answer anew in every step, and its teacher follows the student as a moving average;
  here the answers are written once, and the teacher is the model at the task's start.
- The questions of a step are drawn for it separately, as a function of seed, task, batch and process, so that
  a training that is resumed uses the same ones, and that they are not those of the task's own batch.
  Processes draw different ones, so that results depend on the number of processes. Where several batches
  are a step, the mean over a batch's tokens weighs in the step as its given answers' tokens do.

Questions with an empty answer are left out. A model of two encoders writes no answers, so that it is refused.
A step takes one forward pass more without gradients, and learns from twice as many examples, the task's and
as many answers of its own; both count in the budget of training examples. The answers are a file of the
task's folder.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.distributed import get_rank
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.lwf import Lwf, check_distillation
from llava_keeplora.methods.task_start import divergence
from llava_keeplora.run_folder import Stage
from llava_keeplora.steps import Budget


class SelfDistillation(Lwf):
    """Self-distillation as `methods/self_distillation.py` describes it."""

    info = MethodInfo(
        "self-distillation",
        "Self-Distillation Enables Continual Learning",
        "https://arxiv.org/abs/2601.19897",
        families=("llava",),
    )
    stage_cost = {Stage.PREPARED: 3.0, Stage.TRAINED: 1.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of self-distillation; rank and alpha are the parts'.

        Args:
            strength: λ, the weight of the distillation.
            temperature: τ.
        """

        strength: float = 1.0
        temperature: float = 1.0

        def __post_init__(self) -> None:
            check_distillation(self.strength, self.temperature)

    def __init__(self, options: SelfDistillation.Options):
        super().__init__(options)
        self._batches = torch.zeros((), dtype=torch.int64)
        self._answered: Any = None

    def budget(self, index: int, budgets: Sequence[Budget]) -> Budget:
        """Return the task's own steps, with as many answers of the model's own in each."""
        own = budgets[index - 1]
        return replace(own, batch=2 * own.batch, total=2 * own.seen) if self.options.strength else own

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return a new adapter for every layer, after the model has answered the task's questions."""
        if self.options.strength:
            ctx.report["answered"] = len(ctx.own_answers())
        return super().init_adapters(ctx)

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Hold the questions with the model's own answers."""
        self._batches.zero_()
        self._answered = ctx.own_answers() if self.options.strength else None
        try:
            with super().training_context(ctx, model):
                yield
        finally:
            self._answered = None

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus the distillation on as many questions as the batch has."""
        if not self.options.strength:
            return out["loss"]
        count, size = len(self._answered), len(batch["labels"])
        chosen = random.Random(f"{ctx.seed}/{int(self._batches)}/{get_rank()}").sample(
            range(count), min(size, count)
        )
        self._batches += 1
        own = {key: value.to(out["loss"].device) for key, value in self._answered.collate(chosen).items()}
        with self.start.restored():
            before = ctx.forward(**own)["logits"]
        distilled = divergence(before, ctx.forward(**own)["logits"], self.options.temperature)
        return out["loss"] + self.options.strength * distilled

    def progress(self) -> dict[str, Tensor]:
        """Return how many batches were drawn."""
        return {"batches": self._batches}
