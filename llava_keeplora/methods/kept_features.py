"""Image features that stay near those of the task's start while the task is learned.

    task's own loss + λ · (1 − cos(f_0, f))

with the mean over a batch's images, f an image's features and f_0 those of the model at the task's start. An
image may move as far as its class asks for, and no further; what is learned then moves the features of other
images less as well, and with them the answers on tasks to come. No data but the task's are read. It is no
part of KeepLoRA's paper. Distillation of answers (LwF) keeps the features only as far as the task's own
classes tell them apart; ZSCL keeps answers on reference images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import TaskContext
from llava_keeplora.methods.protecting import ProtectingMethod
from llava_keeplora.methods.task_start import TaskStart

#: Forward passes per example beside training's own, for the features at the start.
FEATURES_COST = 1.0


class KeptFeatures(ProtectingMethod):
    """Base class of methods that may keep image features while a task is learned.

    Attributes:
        distillation: λ; 0 for none.
    """

    distillation = 0.0

    def __init__(self, options: Any):
        super().__init__(options)
        self._start: TaskStart | None = None

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Remember the model at the task's start."""
        self._start = TaskStart(model) if self.distillation else None
        try:
            yield
        finally:
            self._start = None

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus λ times the mean of 1 − cos of old and new image features.

        Raises:
            MethodError: for a family of one's own whose loss gives no image features.
        """
        if self._start is None:
            return out["loss"]
        if "image" not in out:
            raise MethodError(
                "distillation keeps image features, and the model family's loss returns none under 'image'",
                "set distillation to 0, or return them (docs/extending.md)",
            )
        with self._start.restored():
            before = ctx.forward(**batch)["image"]
        moved = 1 - cosine_similarity(before.float(), out["image"].float())
        return out["loss"] + self.distillation * moved.mean()
