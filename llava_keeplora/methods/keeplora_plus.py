"""KeepLoRA+: KeepLoRA with a cosine classifier for every learned task (ICLR 2026, arXiv 2601.19659), on CLIP.

The logits of a learned task are the text's plus 30 cos(f, w_c), f an image's features and w_c a row per
class. The rows begin as the normalised means of their classes' normalised features over all of the task's
training data, on the model as the task finds it (adapters begin without effect), and are trained together
with the adapters, by the same loss. The first-step gradient is the text logits' alone, so A is KeepLoRA's. A
task that isn't learned has no rows: there the answer is the text's. Published: scale 30, AdamW, learning rate
1e-3, weight decay 0.01, 5 epochs per task (order II of MTIL: 1 for its second and third).

Where this differs from the official code (MaolinLuo/KeepLoRA, folder MTIL):

- the means take in every image once; there, the last incomplete batch of a shuffled pass is left out.
- a class without an image begins with the direction of its prompt's features; there it ends the run.
- a task's rows are found by its name; there by its class names joined, so that two tasks with the same
  classes share them.
- the rows are kept with the run; there the checkpoints lack them.
- a row's length doesn't matter to the cosine, so weight decay, though it is applied, moves no answer by
  itself.

Later tasks leave earlier rows as they are, bit for bit, while the image features under them drift as far as
KeepLoRA lets them. The rows read image features, not a layer's input, so they don't merge into the base, and
no checkpoint of CLIP holds them: `export` gives the run's state alone.

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

#: What the model calls the parameter, and how the names of kept rows begin, the task's name following.
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
    )
    stage_cost = KeepLora.stage_cost | {Stage.TRAINED: 1.0}
    supports_zero3 = False

    @dataclass(frozen=True)
    class Options(KeepLora.Options):
        """Settings of KeepLoRA+ beside KeepLoRA's.

        Args:
            scale: factor of the cosines, beside CLIP's own of the text's, which is 100 in the released CLIPs;
                of a CLIP with another, take three tenths. 0 trains and answers as KeepLoRA.
        """

        scale: float = 30.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.scale >= 0.0:
                raise MethodError(
                    f"scale is {self.scale}, but logits grow with the cosine",
                    "set it to 30, as published, or to 0 to do without",
                )

    def __init__(self, options: "KeepLoraPlus.Options"):
        super().__init__(options)
        self.rows: dict[str, Tensor] = {}
        self._trained: dict[str, nn.Parameter] = {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the task's rows on the model."""
        dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        rows = nn.Parameter(class_directions(ctx.task(), ctx.batches()).to(dtype))
        model.register_parameter(ROWS, rows)
        self._trained = {ctx.name: rows}
        try:
            yield
        finally:
            delattr(model, ROWS)
            self._trained = {}

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """The cross-entropy of the text logits and the classifier's together."""
        return cross_entropy(
            out["logits"].float() + cosine_logits(out["image"], self._trained[ctx.name], self.options.scale),
            batch["labels"],
        )

    def extra_state(self) -> dict[str, Tensor]:
        """The task's rows in fp32."""
        return {f"{ROWS}.{task}": trained_values(rows).cpu() for task, rows in self._trained.items()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """KeepLoRA's, and a task's rows."""
        rows = (
            {f"{ROWS}.{ctx.name}": Holding(("classes", feature_width(ctx.model.config)))} if ctx.index else {}
        )
        return super().holds(ctx, names) | rows

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take back every task's rows, and the bases."""
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
        """The text's answer for a task that isn't learned, that of both for one that is."""
        if task not in self.rows:
            return predictor
        return predictor.with_head(partial(cosine_logits, rows=self.rows[task], scale=self.options.scale))


def cosine_logits(image: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Scale · cos(f, w_c), (batch, C) in fp32, outside autocast.

    Args:
        image: f (batch, d), unit length.
        rows: w (C, d), of any length.
        scale: of the cosines.
    """
    with torch.autocast(image.device.type, enabled=False):
        return scale * linear(image.float(), normalize(rows.to(image.device).float()))


@torch.no_grad()
def class_directions(task: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Unit-length rows (C, d).

    The direction of the mean of each class's image features, of its prompt's where it has no image.

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
