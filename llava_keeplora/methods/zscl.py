"""ZSCL: fine-tuning of the whole CLIP, with distillation from the pre-trained model and weight averaging.

Source: Zheng et al., ICCV 2023, https://arxiv.org/abs/2303.06628.

Every parameter but the temperature is trained. With F the unit-length features of a batch of reference
images, G those of all reference texts, e^ls the temperature, Z = e^ls F Gᵀ, and D(P, Q) the mean over the
rows of τ² CE(softmax(P / τ), Q / τ),

    loss = CE with label smoothing + D(Z_0, Z) + D(Z_0ᵀ, Zᵀ) + Σ ‖θ − θ_{t−1}‖²

where Z_0 uses F of the pre-trained model, and both use its G. Every 100 steps, from the first on, the current
weights enter the mean of the weights since the task's start, which is included: θ̄ ← (n θ̄ + θ) / (n + 1). θ̄ is
the result of the task; training itself continues from θ. Published for ViT-B/16: AdamW, learning rate 1e-5
(5e-5 for Aircraft and MNIST), no weight decay, batches of 64, 1000 steps with 100 of warm-up and a cosine
schedule; 64 images of ImageNet per step and all validation captions of Conceptual Captions.

Notes and differences from the official code (https://github.com/Thunderbeee/ZSCL):

- The "text" distillation, D of the transposed Z, trains the image encoder alone, since G is the pre-trained
  model's on both sides; this is what the official code does.
- The official code encodes all texts in every step; the pre-trained model's features never change and are
  computed once per task here.
- Reference images are drawn for each step separately, as a pure function of seed, task and step, instead of
  epoch by epoch, so that they affect nothing else and a resumed training uses the same ones. A step that
  accumulates several batches or processes uses one batch of them. They are no part of the budget of training
  examples, which is of examples with answers: reports list them, for teacher and student, among the other
  passes as `reference`, and `reference data` among the method's needs.
- The Trainer clips gradients unless `max_grad_norm` is 0; the official code does not.
- The default reference data are rendered scenes with captions of two coloured shapes, which need no files and
  belong to no task that CLIP learns. For a CLIP trained on natural images, name natural images and captions.

Legend: T texts, d projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llava_keeplora.adapters import AdapterInit, Deltas, full_deltas
from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Method, MethodInfo, TaskContext
from llava_keeplora_eval.predictors import (
    class_logits,
    image_features,
    prompt_features,
    stack_images,
    to_dtype,
)


class Zscl(Method):
    """ZSCL as `methods/zscl.py` describes it."""

    info = MethodInfo(
        "zscl",
        "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models",
        "https://arxiv.org/abs/2303.06628",
        reference_data=True,
        trained="every parameter but the temperature",
        families=("clip",),
    )
    uses_lora, full_finetuning, supports_zero3 = False, True, False

    @dataclass(frozen=True)
    class Options:
        """Settings of ZSCL.

        Args:
            label_smoothing: fraction of the target that is spread over all classes, in the task's own loss.
            temperature: τ of the distillation.
            distillation: weight of both terms of the distillation; the official `weight_adjust` is 0.5.
            constraint: weight of the squared distance to the task's start.
            ensemble_every: steps between two points of the mean; with 0 the last step's weights are the
                result.
            reference_batch: reference images per step.
            reference: a recipe, by name or file, whose training images are used, without labels.
            reference_texts: a file with one text per line; captions or class prompts of the recipe when None.
        """

        label_smoothing: float = 0.2
        temperature: float = 2.0
        distillation: float = 1.0
        constraint: float = 1.0
        ensemble_every: int = 100
        reference_batch: int = 64
        reference: str = "scene-captions"
        reference_texts: str | None = None

        def __post_init__(self) -> None:
            if not 0.0 <= self.label_smoothing < 1.0:
                raise MethodError(
                    f"label_smoothing must be in [0, 1) (got {self.label_smoothing})",
                    "set it to 0 to switch it off",
                )
            for name in ("distillation", "constraint", "ensemble_every"):
                if not getattr(self, name) >= 0:
                    raise MethodError(
                        f"{name} must not be negative (got {getattr(self, name)})",
                        "set it to 0 to switch it off",
                    )
            if not self.temperature > 0:
                raise MethodError(
                    f"temperature must be above 0 (got {self.temperature})", "set it to 2.0, as published"
                )
            if self.reference_batch < 1:
                raise MethodError(
                    f"reference_batch must be at least 1 (got {self.reference_batch})",
                    "set distillation to 0 to train without reference data",
                )

    def __init__(self, options: "Zscl.Options"):
        super().__init__(options)
        self._steps = torch.zeros((), dtype=torch.int64)
        self._trained: dict[str, nn.Parameter] = {}
        self._start: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._teacher: nn.Module | None = None
        self._texts: Tensor | None = None

    def reference_data_spec(self) -> tuple[str, str | None] | None:
        """Return the reference images and texts of the settings; None if `distillation` is 0."""
        return (self.options.reference, self.options.reference_texts) if self.options.distillation else None

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return no adapters."""
        return {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Hold the pre-trained model, its text features, the initial weights, and their running mean."""
        self._steps.zero_()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start = {name: trained_values(p) for name, p in self._trained.items()}
        self._mean = (
            {name: start.clone() for name, start in self._start.items()}
            if self.options.ensemble_every
            else {}
        )
        if self.reference:
            self._teacher = ctx.pretrained()
            with torch.no_grad():
                self._texts = prompt_features(
                    self._teacher,
                    {key: value.to(self._teacher.device) for key, value in self.reference.texts.items()},
                )
        try:
            yield
        finally:
            self._trained, self._start, self._mean, self._teacher, self._texts = {}, {}, {}, None, None

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the task's own smoothed loss, the distillation, and the distance to the start.

        The distance is computed in fp32.
        """
        loss = cross_entropy(
            out["logits"].float(), batch["labels"], label_smoothing=self.options.label_smoothing
        )
        if self.reference:
            loss = loss + self.options.distillation * self._distillation(ctx)
        if self.options.constraint:
            distance = sum(
                (p.float() - self._start[name]).square().sum() for name, p in self._trained.items()
            )
            loss = loss + self.options.constraint * distance
        return loss

    def _distillation(self, ctx: TaskContext) -> Tensor:
        """Return D(Z_0, Z) + D(Z_0ᵀ, Zᵀ) on the next step's reference images."""
        chosen = self.reference.draw(self.options.reference_batch, ctx.seed, int(self._steps))
        stacked = stack_images(self.reference.images(chosen))
        images = {key: value.to(self._texts.device) for key, value in stacked.items()}
        images = to_dtype(images, self._texts.dtype)
        ctx.passes["reference"] += 2 * len(chosen)  # Through the teacher and the student.
        with torch.no_grad():
            teacher = class_logits(self._teacher, image_features(self._teacher, **images), self._texts)
        student = class_logits(ctx.model, image_features(ctx.model, **images), self._texts)
        temperature = self.options.temperature
        return distillation(teacher, student, temperature) + distillation(teacher.T, student.T, temperature)

    @torch.no_grad()
    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Add the weights to the mean after steps 1, 101, 201, ... (for `ensemble_every` 100)."""
        self._steps.fill_(optimizer_step)
        every = self.options.ensemble_every
        if every and (optimizer_step - 1) % every == 0:
            points = (optimizer_step - 1) // every + 1
            for name, mean in self._mean.items():
                mean.mul_(points).add_(trained_values(self._trained[name])).div_(points + 1)

    def progress(self) -> dict[str, Tensor]:
        """Return the number of steps, and the mean weights."""
        return {"steps": self._steps} | {f"mean.{name}": mean for name, mean in self._mean.items()}

    def finalize_deltas(self, ctx: TaskContext, deltas: Deltas) -> Deltas:
        """Return the mean weights minus those at the task's start."""
        return full_deltas({name: (mean - self._start[name]).cpu() for name, mean in self._mean.items()})


def distillation(P: Tensor, Q: Tensor, temperature: float) -> Tensor:
    """Return D(P, Q), the mean over the rows of τ² CE(softmax(P / τ), Q / τ), in fp32 or higher precision.

    Args:
        P: (rows, columns), logits of the teacher.
        Q: (rows, columns), logits of the student.
        temperature: τ.
    """
    P, Q = (logits.float() if logits.dtype.itemsize < 4 else logits for logits in (P, Q))
    return cross_entropy(Q / temperature, (P / temperature).softmax(dim=1)) * temperature**2
