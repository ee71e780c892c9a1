"""MoE-Adapters: experts that all tasks share, a router per task, and auto-encoders that recognise the task.

Source: Yu et al., CVPR 2024, https://arxiv.org/abs/2403.11549.

In every layer of both encoders, x ← x + MLP(norm x) + 0.1 Σ_e g_e E_e(x): of 22 adapters E_e, the two with
the best scores from the task's router are used, with noise on the scores in training. A task trains its
routers and the experts that are not frozen; after it, the two experts that were used most are frozen in each
layer. At test, the error of an auto-encoder per task tells how familiar an image is: the task with the
smallest error answers it, and above a threshold the frozen CLIP does. Published: 1000 steps of AdamW at 1e-3
(for some data sets 5e-3 or 1e-4) without weight decay, cosine schedule, batch 64, label smoothing 0.2.

Differences from the official code (https://github.com/JiazuoYu/MoE-Adapters4CL):

- The auto-encoders read the frozen CLIP's image features instead of an AlexNet's, so that no second model is
  needed; as these are unit vectors instead of activations between 0 and 1, the decoder is linear. Each is
  trained after its task, with a cosine schedule; there the rate falls to a tenth every ten epochs.
- An error counts relative to the auto-encoder's mean error on every fifth of its task's images, which are
  held out of its training, because an absolute threshold (0.0655 there) fits one feature extractor only; and
  there is no auto-encoder of TinyImageNet for all other images.
- Every image has its own route; `routing: batch` takes one route per batch by its mean error, as there.
- As there, the text router reads the start token, so its gates are the same for every prompt. The
  load-balancing loss, which is computed there but never added, is left out. One template is used in training
  and test.
- The Trainer clips gradients unless `max_grad_norm` is 0; the official code does not.
- An expert that no example used gets a gradient of 0; there it gets none.

Only CLIP: the routers read a class token, and the auto-encoders need one feature per image.

Legend: n images, p width of CLIP's projection, L layers of both encoders, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.distributed import sum_over_processes
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.auto_encoder import AutoEncoder
from llava_keeplora.methods.base import Holding, MethodInfo, TaskContext
from llava_keeplora.methods.experts import Mixture, mixed
from llava_keeplora.methods.routed import ORIGINAL, Route, RoutedMethod, check_routing, encoder_layers

#: Name of the modules on the model while a task trains.
NAME = "moe_adapters"
#: In a state: the key of the experts' counts, and the prefix of the auto-encoder's tensors.
COUNTS, CODER = "counts", "auto_encoder."


class MoeAdapters(RoutedMethod):
    """MoE-Adapters as `methods/moe_adapters.py` describes it."""

    info = MethodInfo(
        "moe-adapters",
        "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts Adapters",
        "https://arxiv.org/abs/2403.11549",
        inference_cost="a second pass of the image encoder, the experts in every layer",
        extra_parameters="experts in every layer; per task a router in every layer and an auto-encoder",
        mergeable=False,
        kept="experts as they are, routers and an auto-encoder per task",
        trained="experts that are not frozen, a router in every layer",
        families=("clip",),
        model_types=("clip", "metaclip_2"),
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of MoE-Adapters.

        Args:
            experts: number of experts per layer.
            top_k: number of experts that an example uses, and that are frozen after each task.
            bottleneck: width of an expert's bottleneck.
            scale: factor on the experts' sum.
            dropout: dropout within the experts while training.
            label_smoothing: fraction of the target that is spread over all classes.
            code: width of the auto-encoders' bottleneck.
            threshold: the error, relative to the mean on the task's own images, above which the frozen CLIP
                answers.
            routing: whether a task is chosen per `sample`, or per `batch` as published.
        """

        experts: int = 22
        top_k: int = 2
        bottleneck: int = 64
        scale: float = 0.1
        dropout: float = 0.1
        label_smoothing: float = 0.2
        code: int = 100
        threshold: float = 2.0
        routing: str = "sample"

        def __post_init__(self) -> None:
            check_routing(self.routing)
            for name in ("bottleneck", "code"):
                if getattr(self, name) < 1:
                    raise MethodError(
                        f"{name} must be at least 1 (got {getattr(self, name)})",
                        "set it to 1 or more",
                    )
            if not 1 <= self.top_k <= self.experts:
                raise MethodError(
                    f"top_k must be from 1 to the number of experts, {self.experts} (got {self.top_k})",
                    "set top_k to, say, 2",
                )
            for name in ("dropout", "label_smoothing"):
                if not 0.0 <= getattr(self, name) < 1.0:
                    raise MethodError(
                        f"{name} must be in [0, 1) (got {getattr(self, name)})",
                        "set it to 0 to switch it off",
                    )
            if not self.threshold > 0:
                raise MethodError(
                    f"threshold must be above 0 (got {self.threshold})",
                    "set it to, say, 2",
                )

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the tasks' tensors; experts and auto-encoders are built from them when they are needed."""
        super().load_state_dicts(states)
        self._mixtures: nn.ModuleDict | None = None
        self._coders: list[AutoEncoder] = []

    def mixtures(self, model: nn.Module, tasks: int) -> nn.ModuleDict:
        """Return part → a mixture per layer, with the experts and routers learned so far.

        Earlier tasks' routers, and the experts that they froze, are frozen.

        Args:
            model: the CLIP model.
            tasks: number of routers; those of tasks not yet learned start at zero.
        """
        options = self.options
        settings = dict(
            experts=options.experts,
            bottleneck=options.bottleneck,
            tasks=tasks,
            top_k=options.top_k,
            scale=options.scale,
            dropout=options.dropout,
        )
        mixtures = nn.ModuleDict(
            {
                part: nn.ModuleList(
                    Mixture(layer.layer_norm2.weight.shape[0], **settings) for layer in layers
                )
                for part, layers in encoder_layers(model).items()
            }
        )
        for task, state in enumerate(self.learned_states):
            # Not strict: a state has only the tensors that its task trained, and those of its auto-encoder.
            mixtures.load_state_dict(state, strict=False)
            for mixture, counts in zip(_flatten(mixtures), state[COUNTS], strict=True):
                mixture.routers[task].requires_grad_(False)
                # Stable: of experts with equal counts, the first ones.
                for index in counts.argsort(descending=True, stable=True)[: options.top_k]:
                    mixture.experts[index].requires_grad_(False)
        return mixtures.to(next(model.parameters()).device)

    # --- training ----------------------------------------------------------------------------------

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the experts on the model, with new routers for the task."""
        task = len(self.learned_states)
        self._trained = self.mixtures(model, task + 1)
        # This process's counts since the last step, and the counts of all processes before it.
        shape = (len(list(_flatten(self._trained))), self.options.experts)
        self._step_counts, self._counts = (
            torch.zeros(shape, dtype=torch.long, device=next(model.parameters()).device) for _ in range(2)
        )
        for mixture, row in zip(_flatten(self._trained), self._step_counts, strict=True):
            mixture.chosen = row
        with ExitStack() as stack:
            model.add_module(NAME, self._trained)
            stack.callback(delattr, model, NAME)
            stack.callback(delattr, self, "_trained")
            for part, layers in encoder_layers(model).items():
                stack.enter_context(mixed(layers, self._trained[part], task))
            yield

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy with smoothed labels."""
        return cross_entropy(
            out["logits"].float(), batch["labels"], label_smoothing=self.options.label_smoothing
        )

    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Add the counts of the step's chosen experts, of all processes."""
        sum_over_processes([self._step_counts])
        self._counts += self._step_counts
        self._step_counts.zero_()

    def progress(self) -> dict[str, Tensor]:
        """Return the counts (L, E) of how often each expert was chosen so far."""
        return {COUNTS: self._counts}

    def extra_state(self) -> dict[str, Tensor]:
        """Return the trained parameters, and how often each expert was chosen."""
        trained = {
            name: trained_values(p).cpu() for name, p in self._trained.named_parameters() if p.requires_grad
        }
        return {**trained, COUNTS: self._counts.cpu()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return a task's routers, its trained experts, how often each was chosen, and its auto-encoder."""
        if not ctx.index:
            return {}
        self.load_state_dicts([])
        with torch.device("meta"):
            mixtures, coder = (
                self.mixtures(ctx.model, ctx.index),
                AutoEncoder(ctx.model.config.projection_dim, self.options.code),
            )
        router = f".routers.{ctx.index - 1}."
        trained = {
            name: Holding(tuple(p.shape), required=router in name)
            for name, p in mixtures.named_parameters()
            if router in name or ".experts." in name
        }
        counts = Holding((len(list(_flatten(mixtures))), self.options.experts), integer=True)
        return {
            **trained,
            COUNTS: counts,
            **{f"{CODER}{name}": Holding(tuple(value.shape)) for name, value in coder.state_dict().items()},
        }

    # --- routing -----------------------------------------------------------------------------------

    def learn_route(self, ctx: TaskContext, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the tensors of an auto-encoder that is trained on the task's image features."""
        coder = AutoEncoder.trained(image, self.options.code, ctx.seed)
        ctx.report["auto_encoder_error"] = float(coder.usual)
        return {f"{CODER}{name}": value for name, value in coder.state_dict().items()}

    def routes(self, image: Tensor) -> list[Route]:
        """Return for each image the task with the smallest error; the frozen CLIP above the threshold."""
        if not self._coders:
            states = [
                {name.removeprefix(CODER): v for name, v in state.items() if name.startswith(CODER)}
                for state in self.learned_states
            ]
            self._coders = [AutoEncoder.read(state).to(image.device) for state in states]
        errors = torch.stack([coder.error(image) / coder.usual for coder in self._coders], dim=1)
        if self.options.routing == "batch":
            errors = errors.mean(dim=0, keepdim=True).expand_as(errors)
        least = errors.min(dim=1)
        return [
            Route(task) if error <= self.options.threshold else ORIGINAL
            for task, error in zip(least.indices.tolist(), least.values.tolist())
        ]

    @contextmanager
    def engaged(
        self, model: nn.Module, task: int, image: Tensor, weights: Tensor, text: float
    ) -> Iterator[None]:
        """Switch the experts on, with a task's routers; an image's weight plays no role."""
        if self._mixtures is None:
            self._mixtures = self.mixtures(model, len(self.learned_states)).eval().requires_grad_(False)
        with ExitStack() as stack:
            for part, layers in encoder_layers(model).items():
                stack.enter_context(mixed(layers, self._mixtures[part], task))
            yield


def _flatten(mixtures: nn.ModuleDict) -> Iterator[Mixture]:
    """Return an iterator over the mixtures of all layers, in order."""
    return (mixture for layers in mixtures.values() for mixture in layers.children())
