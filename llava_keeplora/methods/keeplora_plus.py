"""KeepLoRA+: KeepLoRA with a cosine classifier for every learned task, on CLIP.

Source: Luo et al., ICLR 2026, https://arxiv.org/abs/2601.19659.

The logits of a learned task are the text logits plus 30 cos(f, w_c), with f an image's features and w_c a row
per class. The rows start as the normalised means of their classes' normalised features over all of the task's
training data, on the model before the task (adapters start without effect), and are trained together with the
adapters, by the same loss. The first-step gradient is that of the text logits alone, so A is KeepLoRA's. A
task that has not been learned has no rows and is answered by the text logits. Published: scale 30, AdamW,
learning rate 1e-3, weight decay 0.01, 5 epochs per task (order II of MTIL: 1 for its second and third).

Differences from the official code (https://github.com/MaolinLuo/KeepLoRA, folder MTIL):

- The means include every image once; there the last incomplete batch of a shuffled pass is left out.
- A class without images starts with the direction of its prompt's features; there it ends the run.
- A task's rows are identified by its name; there by its class names joined, so that two tasks with the same
  classes share them.
- The rows are stored with the run; there the checkpoints lack them.

The cosine ignores a row's length, so weight decay, although it is applied to rows, does not change an answer
by itself. Later tasks leave earlier rows unchanged, bit for bit, while the image features drift as much as
KeepLoRA allows. The rows read image features, not a layer's input, so they don't merge into the base, and no
checkpoint of CLIP can hold them: of this method, `export` offers the run's state alone.

Legend: C classes of the task, d width of the shared space.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.distributed import sum_over_processes
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, MethodInfo, TaskContext
from llava_keeplora.methods.keeplora import KeepLora
from llava_keeplora.run_folder import Stage
from llava_keeplora_eval.encoders import feature_width
from llava_keeplora_eval.predictors import ClipPredictor

#: Name of the parameter on the model, and prefix of the rows' names in a state; the task's name follows.
ROWS = "cosine_classifier"


class KeepLoraPlus(KeepLora):
    """KeepLoRA+ as `methods/keeplora_plus.py` describes it."""

    info = MethodInfo(
        "keeplora+",
        "KeepLoRA: Continual Learning with Residual Gradient Adaptation, with a cosine classifier",
        "https://arxiv.org/abs/2601.19659",
        task_id_at_test=True,
        inference_cost="one product with the image features",
        extra_parameters="a row per learned class",
        mergeable=False,
        kept="a basis for every layer, at most as wide as its input, and a row per class",
        trained="B, a row per class",
        families=("clip",),
        variants="`rejection`: the base answers what resembles no learned task",
    )
    stage_cost = KeepLora.stage_cost | {Stage.TRAINED: 1.0}
    supports_zero3 = False
    adopts = False
    answers_from_files = True

    @dataclass(frozen=True)
    class Options(KeepLora.Options):
        """Settings of KeepLoRA+ in addition to KeepLoRA's.

        Args:
            scale: factor on the cosines. The default is for CLIP models whose logit scale is 100, as in the
                released ones; for others, take three tenths of the logit scale. 0 gives KeepLoRA.
        """

        scale: float = 30.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.scale >= 0.0:
                raise MethodError(
                    f"scale must not be negative (got {self.scale})",
                    "set it to 30, as published, or to 0 for no classifier",
                )

    def __init__(self, options: "KeepLoraPlus.Options"):
        super().__init__(options)
        self.rows: dict[str, Tensor] = {}
        self._trained: dict[str, nn.Parameter] = {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the task's rows on the model as a parameter."""
        dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        rows = nn.Parameter(class_directions(ctx.task(), ctx.batches()).to(dtype))
        model.register_parameter(ROWS, rows)
        self._trained = {ctx.name: rows}
        try:
            with super().training_context(ctx, model):
                yield
        finally:
            delattr(model, ROWS)
            self._trained = {}

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of the sum of the text logits and the classifier's."""
        rows = cosine_logits(out["image"], self._trained[ctx.name], self.options.scale)
        own = cross_entropy(out["logits"].float() + rows, batch["labels"])
        return super().loss(ctx, batch, {**out, "loss": own})

    def extra_state(self) -> dict[str, Tensor]:
        """Return the task's rows in fp32."""
        return {f"{ROWS}.{task}": trained_values(rows).cpu() for task, rows in self._trained.items()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return KeepLoRA's tensors and the task's rows."""
        rows = (
            {f"{ROWS}.{ctx.name}": Holding(("classes", feature_width(ctx.model.config)))} if ctx.index else {}
        )
        return super().holds(ctx, names) | rows

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load every task's rows, and KeepLoRA's bases."""
        self.rows = {
            key.removeprefix(f"{ROWS}."): rows
            for state in states
            for key, rows in state.items()
            if key.startswith(ROWS)
        }
        super().load_state_dicts(
            [{key: new for key, new in state.items() if not key.startswith(ROWS)} for state in states]
        )

    def predictor(self, predictor: ClipPredictor, task: str) -> ClipPredictor:
        """Return the predictor with the task's classifier added, if the task has been learned."""
        if task not in self.rows:
            return predictor
        return predictor.with_head(partial(cosine_logits, rows=self.rows[task], scale=self.options.scale))


def cosine_logits(image: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return scale · cos(f, w_c), (batch, C), computed in fp32 outside autocast.

    Args:
        image: f (batch, d), unit length.
        rows: w (C, d), of any length.
        scale: factor on the cosines.
    """
    with torch.autocast(image.device.type, enabled=False):
        return scale * linear(image.float(), normalize(rows.to(image.device).float()))


@torch.no_grad()
def class_directions(task: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Return the initial rows (C, d), of unit length.

    A class's row is the direction of the mean of its image features, or of its prompt's features if it has no
    images.

    Args:
        task: a `llava_keeplora.models.ClipTask`.
        batches: this process's share of the training data; features are summed over processes.
    """
    with task.constants():
        text = task.text().double()
        sums = torch.zeros_like(text)
        for batch in batches:
            sums.index_add_(0, batch["labels"], task(**batch)["image"].double())
    sum_over_processes([sums])
    return normalize(torch.where(sums.any(dim=1, keepdim=True), sums, text))
