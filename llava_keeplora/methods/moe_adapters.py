"""MoE-Adapters.

Experts that all tasks share, a router for each, and auto-encoders that know whose pictures these are (CVPR
2024).

In every layer of both encoders, x ← x + MLP(norm x) + 0.1 Σ_e g_e E_e(x): of 22 adapters E_e the two that the
task's router scores best take part, with noise on the scores in training. A task trains its routers and the
experts that are not frozen; after it, the two that took part most are frozen in each layer. At test, an
auto-encoder per task says how familiar a picture
is: the task with the smallest error answers it, and above a threshold the frozen CLIP does. Published: 1000
steps of AdamW at 1e-3 (for some sets 5e-3 or 1e-4) without weight decay, cosine, batch 64, label smoothing
0.2.

Where this differs from the official code (JiazuoYu/MoE-Adapters4CL):

- the auto-encoders read the frozen CLIP's image features, not an AlexNet's, so that no second model is
  needed; these being unit vectors and no activations between 0 and 1, the decoder is linear. Each learns
  after its task, all of it in one schedule, a cosine, where there the rate falls to a tenth every ten epochs.
- an error counts relative to the auto-encoder's mean error on every fifth of its task's pictures, which it
  isn't trained on, since an absolute threshold (0.0655 there) holds for one extractor alone; and no
  auto-encoder of TinyImageNet stands for everything else.
- one route per picture; `routing: batch` takes one per batch by its mean error, as there.
- as there, the text router reads the start token: its gates are the same for every prompt. The load-balancing
  loss, which is computed there but never added, is left out. One template, in training and test.
- the Trainer clips gradients unless `max_grad_norm` is 0; that code doesn't.
- an expert that no example took has a gradient of 0, where there it has none.

Only CLIP: the routers read a class token, and the auto-encoders a picture's one feature.

Legend: n pictures, p width of CLIP's projection, L layers of both encoders, E experts.
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

#: What the model calls the modules while a task trains.
NAME = "moe_adapters"
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
        model_types=("clip",),
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of MoE-Adapters.

        Args:
            experts: how many in a layer.
            top_k: how many of them an example takes, and how many are frozen after each task.
            bottleneck: width of an expert.
            scale: factor of what the experts add.
            dropout: share of dropped numbers within the experts while training.
            label_smoothing: share of the target that is spread over all classes.
            code: width of the auto-encoders' bottleneck.
            threshold: the error, relative to the mean on the task's own pictures, above which the frozen CLIP
                answers.
            routing: whether a task is chosen for each `sample`, or for each `batch` as published.
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
                        f"{name} is {getattr(self, name)}, but a bottleneck lets something through",
                        "set it to 1 or more",
                    )
            if not 1 <= self.top_k <= self.experts:
                raise MethodError(
                    f"top_k is {self.top_k} with experts {self.experts}, but an example takes one expert to "
                    "all of them",
                    "set top_k to, say, 2",
                )
            for name in ("dropout", "label_smoothing"):
                if not 0.0 <= getattr(self, name) < 1.0:
                    raise MethodError(
                        f"{name} is {getattr(self, name)}, but a share lies in [0, 1)",
                        "set it to 0 to do without",
                    )
            if not self.threshold > 0:
                raise MethodError(
                    f"threshold is {self.threshold}, but an error relative to another is above 0",
                    "set it to, say, 2",
                )

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take the tasks' tensors."""
        super().load_state_dicts(states)
        self._mixtures: nn.ModuleDict | None = None
        self._coders: list[AutoEncoder] = []

    def mixtures(self, model: nn.Module, tasks: int) -> nn.ModuleDict:
        """Part → a mixture per layer, holding what the tasks so far have learned.

        Frozen for good what they froze.

        Args:
            model: the CLIP.
            tasks: number of routers; those of tasks to come start at zero.
        """
        own = self.options
        settings = dict(
            experts=own.experts,
            bottleneck=own.bottleneck,
            tasks=tasks,
            top_k=own.top_k,
            scale=own.scale,
            dropout=own.dropout,
        )
        found = nn.ModuleDict(
            {
                part: nn.ModuleList(
                    Mixture(layer.layer_norm2.weight.shape[0], **settings) for layer in layers
                )
                for part, layers in encoder_layers(model).items()
            }
        )
        for task, state in enumerate(self.learned_states):
            # A task's tensors are a part of all, and its auto-encoder is none of them.
            found.load_state_dict(state, strict=False)
            for mixture, counts in zip(_all(found), state[COUNTS], strict=True):
                mixture.routers[task].requires_grad_(False)
                for index in counts.argsort(descending=True, stable=True)[: own.top_k]:  # of equals the first
                    mixture.experts[index].requires_grad_(False)
        return found.to(next(model.parameters()).device)

    # --- training ----------------------------------------------------------------------------------

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the experts on the model, with routers of the task's own."""
        task = len(self.learned_states)
        self._trained = self.mixtures(model, task + 1)
        # What this process has counted since the last step, and everybody's counts before that.
        shape = (len(list(_all(self._trained))), self.options.experts)
        self._fresh, self._counts = (
            torch.zeros(shape, dtype=torch.long, device=next(model.parameters()).device) for _ in range(2)
        )
        for mixture, row in zip(_all(self._trained), self._fresh, strict=True):
            mixture.chosen = row
        with ExitStack() as held:
            model.add_module(NAME, self._trained)
            held.callback(delattr, model, NAME)
            held.callback(delattr, self, "_trained")
            for part, layers in encoder_layers(model).items():
                held.enter_context(mixed(layers, self._trained[part], task))
            yield

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy with smoothed labels."""
        return cross_entropy(
            out["logits"].float(), batch["labels"], label_smoothing=self.options.label_smoothing
        )

    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Add up which experts took part, in all processes."""
        sum_over_processes([self._fresh])
        self._counts += self._fresh
        self._fresh.zero_()

    def progress(self) -> dict[str, Tensor]:
        """(L, E) which experts took part so far."""
        return {COUNTS: self._counts}

    def extra_state(self) -> dict[str, Tensor]:
        """What was trained, and which experts took part."""
        trained = {
            name: trained_values(p).cpu() for name, p in self._trained.named_parameters() if p.requires_grad
        }
        return {**trained, COUNTS: self._counts.cpu()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """A task's routers, the experts that it trained, how often each took part, and its auto-encoder."""
        if not ctx.index:
            return {}
        self.load_state_dicts([])
        with torch.device("meta"):
            mixtures, coder = (
                self.mixtures(ctx.model, ctx.index),
                AutoEncoder(ctx.model.config.projection_dim, self.options.code),
            )
        own = f".routers.{ctx.index - 1}."
        trained = {
            name: Holding(tuple(p.shape), required=own in name)
            for name, p in mixtures.named_parameters()
            if own in name or ".experts." in name
        }
        counts = Holding((len(list(_all(mixtures))), self.options.experts), integer=True)
        return {
            **trained,
            COUNTS: counts,
            **{f"{CODER}{name}": Holding(tuple(value.shape)) for name, value in coder.state_dict().items()},
        }

    # --- routing -----------------------------------------------------------------------------------

    def learn_route(self, ctx: TaskContext, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """An auto-encoder of the task's pictures."""
        coder = AutoEncoder.trained(image, self.options.code, ctx.seed)
        ctx.report["auto_encoder_error"] = float(coder.usual)
        return {f"{CODER}{name}": value for name, value in coder.state_dict().items()}

    def routes(self, image: Tensor) -> list[Route]:
        """The task whose auto-encoder knows a picture best; the frozen CLIP for those that none knows."""
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
        """Switch the experts on, with a task's routers."""
        if self._mixtures is None:
            self._mixtures = self.mixtures(model, len(self.learned_states)).eval().requires_grad_(False)
        with ExitStack() as held:
            for part, layers in encoder_layers(model).items():
                held.enter_context(mixed(layers, self._mixtures[part], task))
            yield


def _all(mixtures: nn.ModuleDict) -> Iterator[Mixture]:
    """Every layer's mixture, in order."""
    return (mixture for layers in mixtures.values() for mixture in layers.children())
