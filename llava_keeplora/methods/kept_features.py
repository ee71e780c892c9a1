"""Image features that stay near those of the task's start while the task is learned.

    task's own loss + λ · (1 − cos(f_0, f))

with the mean over a batch's images, f an image's features and f_0 those of the model at the task's start. An
image may move as far as its class asks for, and no further; what is learned then moves the features of other
images less as well, and with them the answers on tasks to come. No data but the task's are read. It is no
part of KeepLoRA's paper. Distillation of answers (LwF) keeps the features only as far as the task's own
classes tell them apart; ZSCL keeps answers on reference images.

The model at the start stays the same, and so do the images: where training sees one of them twice, f_0 of all
n is computed in one pass before the first step, without shuffling, and kept on the host, n × d numbers in
fp32. A killed run repeats the pass, so that it ends as it would have. Where images are cropped anew for every
step, or none is seen twice, a step computes f_0 of its own images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Method, TaskContext
from llava_keeplora.methods.task_start import TaskStart, remember_start
from llava_keeplora.run_folder import Stage

#: Forward passes per example beside training's own, for the features at the start.
FEATURES_COST = 1.0


class KeptFeatures(Method):
    """Base class of methods that may keep image features while a task is learned.

    Attributes:
        distillation: λ; 0 for none.
    """

    distillation = 0.0

    def __init__(self, options: Any):
        super().__init__(options)
        self.start: TaskStart | None = None

    def keep_features(self, distillation: float) -> None:
        """Set λ, and count the passes that it takes beside training; in a method's `__init__`."""
        self.distillation, self.keeps_features = distillation, bool(distillation)
        if self.keeps_features:
            training = self.stage_cost.get(Stage.TRAINED, 0.0) + FEATURES_COST
            self.stage_cost = self.stage_cost | {Stage.TRAINED: training}

    @property
    def plain_step(self) -> bool:
        """Whether a training step keeps no features and is that of the task's own loss."""
        own = type(self).loss, type(self).training_context
        return not self.distillation and own == (KeptFeatures.loss, KeptFeatures.training_context)

    def training_context(self, ctx: TaskContext, model: nn.Module) -> AbstractContextManager[None]:
        """Remember the model at the task's start."""
        return remember_start(self, model) if self.distillation else super().training_context(ctx, model)

    def before_steps(self, ctx: TaskContext) -> None:
        """Compute f_0 of all images at once, where training sees images more than once."""
        if self.start and ctx.repeats:
            self.start.keep(ctx, partial(image_features, ctx))

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus λ times the mean of 1 − cos of old and new image features.

        Raises:
            MethodError: see `image_features`.
        """
        if self.start is None:
            return out["loss"]
        before = self.start.output(ctx, batch, partial(image_features, ctx))
        moved = 1 - cosine_similarity(before, _features(out))
        return out["loss"] + self.distillation * moved.mean()


def check_kept_features(distillation: float) -> None:
    """Check λ.

    Raises:
        MethodError: if it is negative or not finite.
    """
    if not 0.0 <= distillation < math.inf:
        raise MethodError(
            f"distillation must be 0 or a positive number (got {distillation})", "set it to 0 for none"
        )


def image_features(ctx: TaskContext, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the image features of a batch, (images, width) in fp32, of the model that is being trained.

    Raises:
        MethodError: for a family of one's own whose loss gives no image features.
    """
    return _features(ctx.forward(**batch))


def _features(out: Mapping[str, Tensor]) -> Tensor:
    if "image" not in out:
        raise MethodError(
            "distillation keeps image features, and the model family's loss returns none under 'image'",
            "set distillation to 0, or return them (docs/extending.md)",
        )
    return out["image"].float()
