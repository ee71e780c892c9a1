"""What methods share that route each picture to modules of a task.

The task is found by what the frozen CLIP sees in the picture.

The base's weights stay as they are; "the frozen CLIP" is the model with the modules switched off. Published
codes choose one task per batch, so that a picture's answer depends on its neighbours and the batch size;
`routing: sample` chooses one per picture.

Legend: n pictures, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Method, TaskContext
from llava_keeplora.run_folder import Stage
from llava_keeplora_eval.predictors import ClipPredictor, class_logits, image_features, to_dtype

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example

ROUTINGS = ("sample", "batch")
#: Sets of class features that are kept at a time.
TEXTS = 128


@dataclass(frozen=True)
class Route:
    """How one picture is answered.

    Args:
        task: whose modules, 0 for the first task's.
        image, text: how much they count in the two encoders.
    """

    task: int
    image: float = 1.0
    text: float = 1.0


#: By the frozen CLIP.
ORIGINAL = Route(-1, 0.0, 0.0)


def check_routing(routing: str) -> None:
    """Refuse an option that is neither of the two."""
    if routing not in ROUTINGS:
        raise MethodError(
            f"routing is '{routing}'", "set it to 'sample', or to 'batch' for one task per batch as published"
        )


def encoder_layers(model: Any) -> dict[str, nn.ModuleList]:
    """Part → the layers of its encoder."""
    return {"vision": model.vision_model.encoder.layers, "text": model.text_model.encoder.layers}


class RoutedMethod(Method):
    """A method without LoRA adapters whose modules are chosen picture by picture.

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
        """What tells the task's pictures from others.

        Args:
            ctx: of the task.
            image: (n, p) features of its training pictures, unit length.
            labels: (n,) classes.
        """
        raise NotImplementedError

    def routes(self, image: Tensor) -> list[Route]:
        """How each picture of a batch is answered.

        Args:
            image: (n, p) features, unit length, in fp32.
        """
        raise NotImplementedError

    def engaged(
        self, model: nn.Module, task: int, image: Tensor, weights: Tensor, text: float
    ) -> AbstractContextManager[None]:
        """Switch a task's modules on for some pictures and the class prompts.

        Args:
            model: the CLIP.
            task: 0 for the first.
            image: (n, p) features of the pictures.
            weights: (n,) how much the modules count for each of them.
            text: how much for the prompts.
        """
        raise NotImplementedError

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """No layer has an adapter."""
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        """Look at the task's pictures once more; the base alone has nothing to choose from."""
        self._added = self.learn_route(ctx, *_seen(ctx)) if ctx.index else {}
        self.load_state_dicts([*self.states[:-1], {**self.states[-1], **self._added}])

    def state_dict(self) -> dict[str, Tensor]:
        """What the last task's route is found by."""
        return dict(self._added)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take the tasks' tensors; modules are made of them when they are needed."""
        self.states = states

    @property
    def learned_states(self) -> list[dict[str, Tensor]]:
        """Each task's tensors, the base's left out."""
        return self.states[1:]

    def predictor(self, predictor: ClipPredictor, task: str) -> RoutedPredictor:
        """Answers by routes."""
        return RoutedPredictor(predictor, self)


class RoutedPredictor:
    """Classification with the modules that each picture is routed to.

    They are on the model for the length of a call.

    Args:
        clip: the frozen model's own predictor.
        method: finds the routes and switches the modules on.
    """

    def __init__(self, clip: ClipPredictor, method: RoutedMethod):
        self.clip, self.method = clip, method
        # The features of one task's modules at one weight; made while these are on.
        self._text = lru_cache(TEXTS)(lambda task, weight: clip.prompt_features())

    @torch.no_grad()
    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Class logits (examples, classes)."""
        clip, model = self.clip, self.clip.model
        inputs = clip.inputs(examples)
        image = image_features(model, **inputs)
        routes = self.method.routes(image.float())
        logits = image.new_empty(len(examples), len(clip.recipe.classes))
        for task, text in dict.fromkeys((route.task, route.text) for route in routes):
            rows = [row for row, route in enumerate(routes) if (route.task, route.text) == (task, text)]
            if task == ORIGINAL.task:
                logits[rows] = class_logits(model, image[rows], self._text(task, text))
                continue
            weights = torch.tensor([routes[row].image for row in rows], device=image.device)
            with self.method.engaged(model, task, image[rows].float(), weights, text):
                own = image_features(model, **{key: value[rows] for key, value in inputs.items()})
                logits[rows] = class_logits(model, own, self._text(task, text))
        return logits

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """The likeliest class of each example, verbatim as in the recipe."""
        if not examples:
            return []
        return [self.clip.recipe.classes[index] for index in self.logits(examples).argmax(dim=1).tolist()]


@torch.no_grad()
def _seen(ctx: TaskContext) -> tuple[Tensor, Tensor]:
    """Return the frozen CLIP's features (n, p) of the task's training pictures, and labels (n,).

    Features are in fp32, both on the host.
    """
    images, labels = [], []
    for batch in ctx.batches():
        inputs = to_dtype({key: value for key, value in batch.items() if key != "labels"}, ctx.model.dtype)
        images.append(image_features(ctx.model, **inputs).float().cpu())
        labels.append(batch["labels"].cpu())
    return _of_all(images), _of_all(labels)


def _of_all(own: list[Tensor]) -> Tensor:
    """Gather rows of all processes in the order of the data, of which each takes every world-th."""
    everyone = all_gather_object(own)
    shares = [torch.cat(share) for share in everyone if share]
    rows = torch.cat(shares)
    for rank, share in enumerate(shares):
        rows[rank :: len(everyone)] = share
    return rows
