"""Base class and predictor of methods that route each image to the modules of a task.

The task is chosen from the frozen CLIP's image features. The base's weights never change; "the frozen CLIP"
is the model with the modules switched off. Published implementations choose one task per batch, so that the
answer to an image depends on its neighbours and the batch size; `routing: sample` chooses one per image.

Legend: n images, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import AnswerContext, Method, TaskContext
from llava_keeplora.methods.switching import BASE, route_names
from llava_keeplora.run_folder import Stage
from llava_keeplora_eval.predictors import (
    ClipPredictor,
    Predictor,
    class_logits,
    image_features,
    to_dtype,
)

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example

ROUTINGS = ("sample", "batch")
#: Number of sets of class features that a predictor caches.
TEXTS = 128


@dataclass(frozen=True)
class Route:
    """The modules that answer one image.

    Args:
        task: the task whose modules are used, 0 for the first; `BASE` for the frozen CLIP.
        image, text: weight of the modules in the two encoders.
    """

    task: int
    image: float = 1.0
    text: float = 1.0


#: The route of images that the frozen CLIP answers.
ORIGINAL = Route(BASE, 0.0, 0.0)


def check_routing(routing: str) -> None:
    """Check the option `routing`.

    Raises:
        MethodError: if it is not one of `ROUTINGS`.
    """
    if routing not in ROUTINGS:
        raise MethodError(
            f"routing must be one of {', '.join(ROUTINGS)} (got '{routing}')",
            "set it to 'sample', or to 'batch' for one task per batch as published",
        )


def encoder_layers(model: Any) -> dict[str, Any]:
    """Return part → the layers of its encoder, for CLIP; an `nn.ModuleList` each."""
    return {"vision": model.vision_model.encoder.layers, "text": model.text_model.encoder.layers}


class RoutedMethod(Method):
    """Base class of methods without LoRA adapters whose modules are chosen per image.

    See the module's docstring.
    """

    uses_lora = False
    supports_zero3 = False
    stage_cost = {Stage.CONSOLIDATED: 1.0}

    def __init__(self, options: Any):
        super().__init__(options)
        self._added: dict[str, Tensor] = {}
        self.load_state_dicts([])

    def learn_route(self, ctx: TaskContext, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return tensors by which the task's images are distinguished from others.

        Args:
            ctx: the task's context.
            image: (n, p) features of its training images, unit length.
            labels: (n,) their classes.
        """
        raise NotImplementedError

    def routes(self, image: Tensor) -> list[Route]:
        """Return the route of each image of a batch.

        Args:
            image: (n, p) features, unit length, in fp32.
        """
        raise NotImplementedError

    def engaged(
        self, model: nn.Module, task: int, image: Tensor, weights: Tensor, text: float
    ) -> AbstractContextManager[None]:
        """Switch a task's modules on for some images and the class prompts, while the block runs.

        Args:
            model: the CLIP model.
            task: the task, 0 for the first.
            image: (n, p) features of the images.
            weights: (n,) weight of the modules for each image.
            text: weight of the modules for the class prompts.
        """
        raise NotImplementedError

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return no adapters."""
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        """Learn the task's route from its training images; do nothing on the base."""
        self._added = self.learn_route(ctx, *_task_features(ctx)) if ctx.index else {}
        self.load_state_dicts([*self.states[:-1], {**self.states[-1], **self._added}])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the last task's `learn_route`."""
        return dict(self._added)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the tasks' tensors; modules are built from them when they are needed."""
        self.states = states

    @property
    def learned_states(self) -> list[dict[str, Tensor]]:
        """The tensors of each task, without the base's."""
        return self.states[1:]

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> RoutedPredictor:
        """Return a predictor that routes every image."""
        return RoutedPredictor(cast(ClipPredictor, predictor), ctx.learned, self)


class RoutedPredictor:
    """Classification with the modules that each image is routed to.

    The modules are on the model only during a call.

    Args:
        clip: the frozen model's own predictor.
        learned: names of the tasks learned, in order.
        method: chooses the routes and switches the modules on.
    """

    def __init__(self, clip: ClipPredictor, learned: Sequence[str], method: RoutedMethod):
        self.clip, self.learned, self.method = clip, learned, method
        #: See `Predictor`.
        self.routed_to: list[str | None] = []
        # Class features by task and weight; called while that task's modules are on.
        self._text = lru_cache(TEXTS)(lambda task, weight: clip.prompt_features())

    @torch.no_grad()
    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Return the class logits (examples, classes)."""
        clip, model = self.clip, self.clip.model
        inputs = clip.inputs(examples)
        image = image_features(model, **inputs)
        routes = self.method.routes(image.float())
        self.routed_to = route_names([route.task for route in routes], self.learned)
        logits = image.new_empty(len(examples), len(clip.recipe.classes))
        for task, text in dict.fromkeys((route.task, route.text) for route in routes):
            rows = [row for row, route in enumerate(routes) if (route.task, route.text) == (task, text)]
            if task == ORIGINAL.task:
                logits[rows] = class_logits(model, image[rows], self._text(task, text))
                continue
            weights = torch.tensor([routes[row].image for row in rows], device=image.device)
            with self.method.engaged(model, task, image[rows].float(), weights, text):
                features = image_features(model, **{key: value[rows] for key, value in inputs.items()})
                logits[rows] = class_logits(model, features, self._text(task, text))
        return logits

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """Return the likeliest class of each example, verbatim as in the recipe."""
        if not examples:
            return []
        return [self.clip.recipe.classes[index] for index in self.logits(examples).argmax(dim=1).tolist()]


@torch.no_grad()
def _task_features(ctx: TaskContext) -> tuple[Tensor, Tensor]:
    """Return the frozen CLIP's features (n, p) of the task's training images in fp32, and labels (n,).

    Both are of all processes and on the host.
    """
    images, labels = [], []
    for batch in ctx.batches():
        inputs = to_dtype({key: value for key, value in batch.items() if key != "labels"}, ctx.model.dtype)
        images.append(image_features(ctx.model, **inputs).float().cpu())
        labels.append(batch["labels"].cpu())
    return _gather_rows(images), _gather_rows(labels)


def _gather_rows(batches: list[Tensor]) -> Tensor:
    """Gather the rows of all processes in the order of the data, of which each process has every world-th."""
    gathered = all_gather_object(batches)
    shares = [torch.cat(share) for share in gathered if share]
    rows = torch.cat(shares)
    for rank, share in enumerate(shares):
        rows[rank :: len(gathered)] = share
    return rows
