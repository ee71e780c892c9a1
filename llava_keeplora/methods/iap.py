"""IAP: prompts for every task, opened layer by layer for each picture (arXiv 2503.20612).

The prompts are weighed by how well a picture fits the task.

Attention becomes softmax(Q Kᵀ) V + w g softmax(Q P_kᵀ) P_v before its output projection, 8 prompts P each, in
all layers of the image encoder and the first 8 of the text encoder. g is 0 or 1, a layer's and a picture's
own, from the frozen CLIP's features f by a hard Gumbel softmax of temperature 3; the text encoder has none.
With a Gaussian of f for every task and class, a picture is answered by the task of the highest log N(f; μ, Σ
/ 2), with w = σ(that / p − 1), 0 below 0.2 and 1 above 0.8; in between w comes from the five likeliest of the
task's classes, σ(their mean log N(f; μ, Σ / 10) / p − 1). Training has w = 1. Published: one epoch of SGD
without momentum or weight decay, learning rate 5 falling to 0.005 by a cosine, batch 128.

Where this differs from the official code (FerdinandZJU/IAP):

- the gates are drawn in training only; there they are also drawn at test, so that no two evaluations agree.
- each gate acts on its own picture's tokens; there the gates, in the order of the pictures, meet rows in the
  order of the tokens.
- a picture has its own task and its own w in both encoders; `routing: batch` takes the batch's commonest task
  and, for the prompts, its mean w, as there. w goes by hundredths, so that a task has at most a hundred sets
  of class features.
- Gaussians are kept with the run (there they are lost with the process), as Cholesky factors. Of a class with
  one picture the covariance is the ridge (there 0 / 0), and with fewer than five classes all of them count
  (there it stops).
- the Trainer clips gradients unless `max_grad_norm` is 0; that code doesn't, and plain SGD feels it.
- p is the width of CLIP's projection; there it is 512 whatever the model.

Only CLIP: LLaVA has neither class prompts nor one feature per picture.

Legend: n pictures, p width of CLIP's projection.
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

#: What the model calls the modules while a task trains.
NAME = "iap"
#: Where covariances come from few pictures they are not definite without.
TASK_RIDGE, CLASS_RIDGE = 1e-7, 1e-3
TASK_SCALE, CLASS_SCALE = 0.5, 0.1
LIKELIEST = 5
HUNDREDTHS = 100


class TaskPrompts(nn.Module):
    """A task's prompts in both encoders, and the gates of the image encoder's.

    Args:
        model: the CLIP.
        options: `Iap.Options`.
    """

    def __init__(self, model: nn.Module, options: "Iap.Options"):
        super().__init__()
        attentions = {
            part: [layer.self_attn for layer in layers] for part, layers in encoder_layers(model).items()
        }
        attentions["text"] = attentions["text"][: options.text_layers]
        for part, found in attentions.items():
            self.add_module(
                part, nn.ModuleList(Prompts(one.embed_dim, options.prompts, one.num_heads) for one in found)
            )
        width = feature_width(model.config)
        self.gates = nn.ModuleList(Gate(width, options.temperature) for _ in self.vision)

    def open(self, image: Tensor) -> list[Tensor]:
        """Layer by layer, which pictures its prompts are open for (n,), given their features (n, p)."""
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
        model_types=("clip", "siglip"),
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of IAP.

        Args:
            prompts: how many in an attention.
            text_layers: how many of the text encoder's layers have prompts, from the first; all where there
                are fewer.
            temperature: that of the gates' Gumbel softmax.
            low: below this weight the frozen CLIP answers.
            high: above this weight the prompts count in full.
            routing: whether a task is chosen for each `sample`, or for each `batch` as published.
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
                    f"prompts is {self.prompts}, but there is nothing else to train", "set it to 1 or more"
                )
            if self.text_layers < 0:
                raise MethodError(
                    f"text_layers is {self.text_layers}, but layers are counted from 0",
                    "set it to 0 for prompts in the image encoder alone",
                )
            if not self.temperature > 0:
                raise MethodError(f"temperature is {self.temperature}, but it divides", "set it to, say, 3")
            if not 0.0 <= self.low <= self.high <= 1.0:
                raise MethodError(
                    f"low is {self.low} and high {self.high}, but weights lie in [0, 1]",
                    "set them to, say, 0.2 and 0.8",
                )

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take the tasks' tensors."""
        super().load_state_dicts(states)
        self._prompts: list[TaskPrompts] = []
        self._tasks: Gaussians | None = None

    # --- training ----------------------------------------------------------------------------------

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the task's prompts and gates on the model.

        Before each batch the frozen CLIP looks at it for the gates.
        """
        self._trained = TaskPrompts(model, self.options).to(next(model.parameters()).device)
        # While the frozen CLIP looks, no prompts are read.
        gates: list[Tensor] = []
        looking = False

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal looking
            if looking:
                return
            gates.clear()
            looking = True
            try:
                with torch.no_grad():
                    inputs = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
                    image = image_features(model, **inputs)
            finally:
                looking = False
            gates.extend(self._trained.open(image))

        with ExitStack() as held:
            model.add_module(NAME, self._trained)
            held.callback(delattr, model, NAME)
            held.callback(delattr, self, "_trained")
            held.callback(model.vision_model.register_forward_pre_hook(look, with_kwargs=True).remove)
            held.enter_context(
                _on(model, self._trained, lambda number: None if looking else gates[number], 1.0)
            )
            yield

    def extra_state(self) -> dict[str, Tensor]:
        """The task's prompts and gates."""
        return {name: trained_values(p).cpu() for name, p in self._trained.named_parameters()}

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """A task's prompts and gates, and the Gaussians of it and of its classes that have pictures."""
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
        """The Gaussians of the task and of its classes that have pictures."""
        classes = [image[labels == label] for label in labels.unique()]
        task, own = Gaussians.fit([image], TASK_RIDGE), Gaussians.fit(classes, CLASS_RIDGE)
        ctx.report["classes"] = {
            "with pictures": len(classes),
            "with one": sum(len(rows) == 1 for rows in classes),
        }
        return {
            "task.means": task.means,
            "task.factors": task.factors,
            "classes.means": own.means,
            "classes.factors": own.factors,
        }

    def routes(self, image: Tensor) -> list[Route]:
        """The task in which a picture is likeliest, and how much its prompts count."""
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
            Route(*own) if own[1] or own[2] else ORIGINAL
            for own in zip(tasks.tolist(), weights.tolist(), text.tolist())
        ]

    def _class_weight(self, image: Tensor, task: int) -> Tensor:
        """W (n,) by the likeliest classes of a task."""
        state = self.learned_states[task]
        found = Gaussians(state["classes.means"], state["classes.factors"]).log_density(image, CLASS_SCALE)
        return (
            found.topk(min(LIKELIEST, found.shape[1]), dim=1).values.mean(dim=1) / image.shape[1] - 1
        ).sigmoid()

    @contextmanager
    def engaged(
        self, model: nn.Module, task: int, image: Tensor, weights: Tensor, text: float
    ) -> Iterator[None]:
        """Switch a task's prompts on, each where its gate is open and as its picture's weight says."""
        if not self._prompts:
            self._prompts = [self._read(model, state) for state in self.learned_states]
        own = self._prompts[task]
        factors = [gate * weights for gate in own.open(image)]
        with _on(model, own, lambda number: factors[number], text):
            yield

    def _read(self, model: nn.Module, state: dict[str, Tensor]) -> TaskPrompts:
        """A task's prompts as they were kept."""
        found = TaskPrompts(model, self.options)
        found.load_state_dict({name: state[name] for name in found.state_dict()})
        return found.to(next(model.parameters()).device).eval().requires_grad_(False)


@contextmanager
def _on(model: nn.Module, prompts: TaskPrompts, vision, text: float) -> Iterator[None]:
    """Have both encoders read a task's prompts.

    The images as `vision` says of each layer, the class prompts all alike.
    """
    layers = {part: [layer.self_attn for layer in found] for part, found in encoder_layers(model).items()}
    with (
        prompted(layers["vision"], prompts.vision, vision),
        prompted(layers["text"], prompts.text, lambda number: text),
    ):
        yield
