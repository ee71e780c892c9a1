"""ZSCL: fine-tunes the whole CLIP, distilled from the pre-trained one, and averages its weights.

Source: ICCV 2023.

Trained is every parameter but the temperature. With F the unit-length features of a batch of reference
pictures, G those of all reference texts, e^ls the temperature, Z = e^ls F Gᵀ, and D(P, Q) the mean over the
rows of τ² CE(softmax(P / τ), Q / τ),

    loss = CE with label smoothing + D(Z_0, Z) + D(Z_0ᵀ, Zᵀ) + Σ ‖θ − θ_{t−1}‖²

where Z_0 has F of the pre-trained model, and both have its G. Every 100 steps, from the first on, the mean of
the weights since the task's start, the start included, takes in the present ones: θ̄ ← (n θ̄ + θ) / (n + 1).
θ̄ is what the task leaves; training
itself goes on from θ. Published for ViT-B/16: AdamW, learning rate 1e-5 (5e-5 for Aircraft and MNIST), no
weight decay, batches of 64, 1000 steps with 100 of warm-up and a cosine; 64 pictures of ImageNet a step and
all validation captions of Conceptual Captions.

Where this differs:

- from its name: the text encoder's distillation, D of the transposed Z, moves the image encoder alone, since
  G is the pre-trained model's on both sides; so it is in the official code, which is what is followed here.
- from the official code (Thunderbeee/ZSCL): that encodes all texts in every step; the pre-trained model's
  never change, and here are encoded once a task. Reference pictures are drawn for each step on its own, a
  pure function of seed, task and step, not epoch by epoch, so that they disturb nothing else and a training
  that was killed goes on with the same ones. Steps that are put together from several batches or processes
  have one batch of them. The Trainer clips gradients unless `max_grad_norm` is 0; that doesn't.
- reference data by default: rendered scenes with captions of two coloured shapes, which need no files and
  belong to no task that CLIP learns. For a CLIP that has seen the world, name pictures and texts of the
  world.

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
            label_smoothing: share of the target that is spread over all classes, in the task's own loss.
            temperature: τ of the distillation.
            distillation: weight of the distillation, over texts and over pictures alike; the official
                `weight_adjust` is 0.5.
            constraint: weight of the squared distance to the task's start.
            ensemble_every: steps from one point of the mean to the next; 0 leaves the last step's weights.
            reference_batch: reference pictures in a step.
            reference: a recipe, by name or file; its training pictures are looked at, its labels aren't.
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
                    f"label_smoothing is {self.label_smoothing}, but a share of the target lies in [0, 1)",
                    "set it to 0 to do without",
                )
            for name in ("distillation", "constraint", "ensemble_every"):
                if not getattr(self, name) >= 0:
                    raise MethodError(
                        f"{name} is {getattr(self, name)}, but it is not negative",
                        "set it to 0 to do without",
                    )
            if not self.temperature > 0:
                raise MethodError(
                    f"temperature is {self.temperature}, but logits are divided by it", "set it to 2.0"
                )
            if self.reference_batch < 1:
                raise MethodError(
                    f"reference_batch is {self.reference_batch}, but a batch holds something",
                    "set distillation to 0 to do without",
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
        """The pictures and texts of the settings, unless nothing is distilled."""
        return (self.options.reference, self.options.reference_texts) if self.options.distillation else None

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """No adapters."""
        return {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Hold the pre-trained model, its texts, the task's start and the mean of weights since then."""
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
        """The task's own loss, smoothed, the distillation, and the distance to the task's start in fp32."""
        loss = cross_entropy(
            out["logits"].float(), batch["labels"], label_smoothing=self.options.label_smoothing
        )
        if self.reference:
            loss = loss + self.options.distillation * self._distilled(ctx)
        if self.options.constraint:
            distance = sum(
                (p.float() - self._start[name]).square().sum() for name, p in self._trained.items()
            )
            loss = loss + self.options.constraint * distance
        return loss

    def _distilled(self, ctx: TaskContext) -> Tensor:
        """D(Z_0, Z) + D(Z_0ᵀ, Zᵀ) on the next step's reference pictures."""
        chosen = self.reference.draw(self.options.reference_batch, ctx.seed, int(self._steps))
        stacked = stack_images(self.reference.images(chosen))
        images = {key: value.to(self._texts.device) for key, value in stacked.items()}
        images = to_dtype(images, self._texts.dtype)
        with torch.no_grad():
            meant = class_logits(self._teacher, image_features(self._teacher, **images), self._texts)
        found = class_logits(ctx.model, image_features(ctx.model, **images), self._texts)
        temperature = self.options.temperature
        return distillation(meant, found, temperature) + distillation(meant.T, found.T, temperature)

    @torch.no_grad()
    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Let the mean take in the weights after steps 1, 101, 201, ..."""
        self._steps.fill_(optimizer_step)
        every = self.options.ensemble_every
        if every and (optimizer_step - 1) % every == 0:
            points = (optimizer_step - 1) // every + 1
            for name, mean in self._mean.items():
                mean.mul_(points).add_(trained_values(self._trained[name])).div_(points + 1)

    def progress(self) -> dict[str, Tensor]:
        """The number of steps, and the mean."""
        return {"steps": self._steps} | {f"mean.{name}": mean for name, mean in self._mean.items()}

    def finalize_deltas(self, ctx: TaskContext, deltas: Deltas) -> Deltas:
        """The mean less the task's start."""
        return full_deltas({name: (mean - self._start[name]).cpu() for name, mean in self._mean.items()})


def distillation(P: Tensor, Q: Tensor, temperature: float) -> Tensor:
    """D(P, Q), the mean over the rows of τ² CE(softmax(P / τ), Q / τ), in fp32 at least.

    Args:
        P: (rows, columns), what is meant.
        Q: (rows, columns), what is found.
        temperature: τ.
    """
    P, Q = (logits.float() if logits.dtype.itemsize < 4 else logits for logits in (P, Q))
    return cross_entropy(Q / temperature, (P / temperature).softmax(dim=1)) * temperature**2
