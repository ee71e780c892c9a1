"""IAP: prompts for every task, gated per layer and weighted per image.

Source: https://arxiv.org/abs/2503.20612.

Attention becomes softmax(Q Kᵀ) V + w g softmax(Q P_kᵀ) P_v before its output projection, with 8 prompts P
each, in all layers of the image encoder and the first 8 of the text encoder. The gate g, 0 or 1 for each
layer and image, comes from the frozen CLIP's features f by a hard Gumbel softmax of temperature 3; the text
encoder has no gates. With a Gaussian of f for every task and class, an image is answered by the task with the
highest log N(f; μ, Σ / 2), with weight w = σ(that / p − 1), set to 0 below 0.2 and to 1 above 0.8; in
between, w is σ(m / p − 1) with m the mean log N(f; μ, Σ / 10) of the task's five likeliest classes. Training
uses w = 1. Published: one epoch of SGD without momentum or weight decay, learning rate 5 falling to 0.005 by
a cosine, batch 128.

Differences from the official code (https://github.com/FerdinandZJU/IAP):

- The gates are sampled in training only; there they are sampled at test too, so that no two evaluations
  agree.
- Each gate acts on its own image's tokens; there the gates, ordered by image, are applied to rows ordered by
  token.
- Every image has its own task and its own w in both encoders; `routing: batch` takes the batch's most
  frequent task and, for the class prompts, its mean w, as there. w is rounded to hundredths, so that a task
  has at most a hundred sets of class features.
- Gaussians are stored with the run, as Cholesky factors (there they are lost with the process). The
  covariance of a class with one image is the ridge (there 0 / 0), and with fewer than five classes all of
  them count (there it stops with an error).
- The Trainer clips gradients unless `max_grad_norm` is 0; the official code does not, which matters for plain
  SGD.
- p is the width of CLIP's projection; there it is 512 for every model.

Only models of two encoders with CLIP's attention in both: LLaVA has neither class prompts nor one feature per
image.

Legend: n images, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, MethodInfo, TaskContext
from llava_keeplora.methods.gaussians import Gaussians
from llava_keeplora.methods.prompts import Gate, Prompts, prompted
from llava_keeplora.methods.routed import ORIGINAL, Route, RoutedMethod, check_routing, encoder_layers
from llava_keeplora_eval.encoders import feature_width
from llava_keeplora_eval.predictors import image_features

#: Name of the modules on the model while a task trains.
NAME = "iap"
#: Added to the diagonals of covariances, which are singular for few images.
TASK_RIDGE, CLASS_RIDGE = 1e-7, 1e-3
TASK_SCALE, CLASS_SCALE = 0.5, 0.1
LIKELIEST = 5
HUNDREDTHS = 100


class TaskPrompts(nn.Module):
    """A task's prompts in both encoders, and the gates of the image encoder.

    Args:
        model: the CLIP model.
        options: `Iap.Options`.
    """

    def __init__(self, model: nn.Module, options: "Iap.Options"):
        super().__init__()
        attentions = {
            part: [layer.self_attn for layer in layers] for part, layers in encoder_layers(model).items()
        }
        attentions["text"] = attentions["text"][: options.text_layers]
        for part, modules in attentions.items():
            self.add_module(
                part,
                nn.ModuleList(Prompts(attn.embed_dim, options.prompts, attn.num_heads) for attn in modules),
            )
        width = feature_width(model.config)
        self.gates = nn.ModuleList(Gate(width, options.temperature) for _ in self.vision)

    def open(self, image: Tensor) -> list[Tensor]:
        """Return the gates (n,) of every layer, given the images' features (n, p)."""
        return [gate(image) for gate in self.gates]


class Iap(RoutedMethod):
    """IAP as `methods/iap.py` describes it."""

    info = MethodInfo(
        "iap",
        "IAP: Improving Continual Learning of Vision-Language Models via Instance-Aware Prompting",
        "https://arxiv.org/abs/2503.20612",
        inference_cost="a second pass of the image encoder, prompts in its attentions, "
        "class prompts once per weight",
        extra_parameters="per task prompts and gates, and a Gaussian for it and each of its classes",
        mergeable=False,
        kept="prompts, gates and Gaussians per task and class",
        trained="prompts and gates",
        families=("clip",),
        model_types=("clip", "metaclip_2", "siglip", "siglip2"),
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of IAP.

        Args:
            prompts: number of prompts per attention.
            text_layers: number of the text encoder's first layers that have prompts, at most all.
            temperature: temperature of the gates' Gumbel softmax.
            low: a weight below this is set to 0, so that the frozen CLIP answers.
            high: a weight above this is set to 1, so that the prompts count in full.
            routing: whether a task is chosen per `sample`, or per `batch` as published.
        """

        prompts: int = 8
        text_layers: int = 8
        temperature: float = 3.0
        low: float = 0.2
        high: float = 0.8
        routing: str = "sample"

        def __post_init__(self) -> None:
            check_routing(self.routing)
            if self.prompts < 1:
                raise MethodError(
                    f"prompts must be at least 1, as nothing else is trained (got {self.prompts})",
                    "set it to 1 or more",
                )
            if self.text_layers < 0:
                raise MethodError(
                    f"text_layers must not be negative (got {self.text_layers})",
                    "set it to 0 for prompts in the image encoder alone",
                )
            if not self.temperature > 0:
                raise MethodError(
                    f"temperature must be above 0 (got {self.temperature})", "set it to, say, 3"
                )
            if not 0.0 <= self.low <= self.high <= 1.0:
                raise MethodError(
                    f"low and high must satisfy 0 <= low <= high <= 1 (got {self.low} and {self.high})",
                    "set them to, say, 0.2 and 0.8",
                )

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the tasks' tensors; prompts and Gaussians are built from them when they are needed."""
        super().load_state_dicts(states)
        self._prompts: list[TaskPrompts] = []
        self._tasks: Gaussians | None = None

    # --- training ----------------------------------------------------------------------------------

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the task's prompts and gates on the model.

        Before each batch, the frozen CLIP computes the features from which the gates are set.
        """
        self._trained = TaskPrompts(model, self.options).to(next(model.parameters()).device)
        # While the frozen CLIP computes features, the prompts are switched off.
        gates: list[Tensor] = []
        in_frozen_pass = False

        def set_gates(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal in_frozen_pass
            if in_frozen_pass:
                return
            gates.clear()
            in_frozen_pass = True
            try:
                with torch.no_grad():
                    inputs = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
                    image = image_features(model, **inputs)
            finally:
                in_frozen_pass = False
            gates.extend(self._trained.open(image))

        with ExitStack() as stack:
            model.add_module(NAME, self._trained)
            stack.callback(delattr, model, NAME)
            stack.callback(delattr, self, "_trained")
            stack.callback(model.vision_model.register_forward_pre_hook(set_gates, with_kwargs=True).remove)
            stack.enter_context(
                _prompts_on(
                    model, self._trained, lambda number: None if in_frozen_pass else gates[number], 1.0
                )
            )
            yield

    def extra_state(self) -> dict[str, Tensor]:
        """Return the task's prompts and gates."""
        return {name: trained_values(p).cpu() for name, p in self._trained.named_parameters()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return a task's prompts and gates, and the Gaussians of the task and of its classes with images."""
        if not ctx.index:
            return {}
        with torch.device("meta"):
            prompts = TaskPrompts(ctx.model, self.options)
        width = feature_width(ctx.model.config)
        gaussians = {
            f"{of}.{what}": Holding(shape)
            for of, count in (("task", 1), ("classes", "classes"))
            for what, shape in (("means", (count, width)), ("factors", (count, width, width)))
        }
        return {name: Holding(tuple(p.shape)) for name, p in prompts.named_parameters()} | gaussians

    # --- routing -----------------------------------------------------------------------------------

    def learn_route(self, ctx: TaskContext, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the Gaussians of the task and of its classes that have images."""
        classes = [image[labels == label] for label in labels.unique()]
        task, per_class = Gaussians.fit([image], TASK_RIDGE), Gaussians.fit(classes, CLASS_RIDGE)
        ctx.report["classes"] = {
            "with pictures": len(classes),
            "with one": sum(len(rows) == 1 for rows in classes),
        }
        return {
            "task.means": task.means,
            "task.factors": task.factors,
            "classes.means": per_class.means,
            "classes.factors": per_class.factors,
        }

    def routes(self, image: Tensor) -> list[Route]:
        """Return for each image its likeliest task, and the weight of that task's prompts."""
        if self._tasks is None:
            self._tasks = Gaussians(
                *(
                    torch.cat([state[f"task.{name}"] for state in self.learned_states]).to(image.device)
                    for name in ("means", "factors")
                )
            )
        best, tasks = self._tasks.log_density(image, TASK_SCALE).max(dim=1)
        weights, batch = (best / image.shape[1] - 1).sigmoid(), self.options.routing == "batch"
        if batch:
            tasks = tasks.bincount().argmax().expand_as(tasks)
        unsure = (weights >= self.options.low) & (weights <= self.options.high)
        weights = (weights > self.options.high).to(weights)
        for task in tasks[unsure].unique().tolist():
            rows = unsure & (tasks == task)
            weights[rows] = self._class_weight(image[rows], task)
        weights = (weights * HUNDREDTHS).round() / HUNDREDTHS
        text = (weights.mean() * HUNDREDTHS).round().div(HUNDREDTHS).expand_as(weights) if batch else weights
        return [
            Route(task, image_weight, text_weight) if image_weight or text_weight else ORIGINAL
            for task, image_weight, text_weight in zip(tasks.tolist(), weights.tolist(), text.tolist())
        ]

    def _class_weight(self, image: Tensor, task: int) -> Tensor:
        """Return the weights w (n,) of images (n, p) from the likeliest classes of a task."""
        state = self.learned_states[task]
        classes = Gaussians(state["classes.means"], state["classes.factors"])
        densities = classes.log_density(image, CLASS_SCALE)
        likeliest = densities.topk(min(LIKELIEST, densities.shape[1]), dim=1).values
        return (likeliest.mean(dim=1) / image.shape[1] - 1).sigmoid()

    @contextmanager
    def engaged(
        self, model: nn.Module, task: int, image: Tensor, weights: Tensor, text: float
    ) -> Iterator[None]:
        """Switch a task's prompts on, multiplied by each image's gates and weight."""
        if not self._prompts:
            self._prompts = [self._load_prompts(model, state) for state in self.learned_states]
        prompts = self._prompts[task]
        factors = [gate * weights for gate in prompts.open(image)]
        with _prompts_on(model, prompts, lambda number: factors[number], text):
            yield

    def _load_prompts(self, model: nn.Module, state: dict[str, Tensor]) -> TaskPrompts:
        """Return a task's prompts from its state, frozen."""
        prompts = TaskPrompts(model, self.options)
        prompts.load_state_dict({name: state[name] for name in prompts.state_dict()})
        return prompts.to(next(model.parameters()).device).eval().requires_grad_(False)


@contextmanager
def _prompts_on(model: nn.Module, prompts: TaskPrompts, vision, text: float) -> Iterator[None]:
    """Add a task's prompts to both encoders while the block runs.

    Args:
        model: the CLIP model.
        prompts: the task's prompts.
        vision: number of an image encoder's layer → factors of its prompts (n,), or None for none.
        text: factor of the text encoder's prompts.
    """
    layers = {part: [layer.self_attn for layer in encoder] for part, encoder in encoder_layers(model).items()}
    with (
        prompted(layers["vision"], prompts.vision, vision),
        prompted(layers["text"], prompts.text, lambda number: text),
    ):
        yield
