"""A model without weights, prepared for one method of a run: its adapters, its task and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit, attach, detach
from llava_keeplora.capture import autocast_dtype
from llava_keeplora.config import MethodConfig, RunConfig, make_method
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Layer, TaskContext, find_layers
from llava_keeplora.models import DTYPES, Family, Work, recomputes, repeated
from llava_keeplora.plan.allocation_tracker import faked, metered
from llava_keeplora.plan.machine import model_bytes
from llava_keeplora.plan.sharding import Sharding
from llava_keeplora_eval.llava import question_features
from llava_keeplora_eval.predictors import image_features, prompt_features, to_dtype

Measured = TypeVar("Measured")


class Rehearsal:
    """One method of a run on a kind of machine, to be executed on fake tensors.

    Args:
        config: the run.
        method: the method.
        family: the model; its `model` is a skeleton.
        work: the tasks.
        sharding: how training is distributed.
        cpu: whether the run has no GPU.
        base_copies: bytes of the base's weights that a run copies, of all layers that any method changes.
        general: the method's general data, see `Method.general_data_spec`; None for none.
        shared: what was measured for other methods of the run; see `_once`.
    """

    def __init__(
        self,
        config: RunConfig,
        method: MethodConfig,
        family: Family,
        work: Sequence[Work],
        sharding: Sharding,
        cpu: bool,
        base_copies: int,
        general: Work | None = None,
        shared: dict[Any, Any] | None = None,
    ):
        self.config, self.family, self.work = config, family, work
        self.sharding, self.cpu, self.base_copies = sharding, cpu, base_copies
        self.method, self.training = make_method(method), method.training
        self.label, self.crops = method.label, method.random_resized_crop
        self.changed = find_layers(method.parts, family)
        self.layers = self.changed.adapted
        self.subspaces = self.method.subspace_plan()
        self.planned = self.method.planned_adapters(self.layers)
        self.dtype = DTYPES[config.model.dtype]
        #: Bytes of the model's parameters and buffers; counted now, before adapters are attached to it.
        self.model_bytes = model_bytes(family.model)
        self.general, self.shared = general, {} if shared is None else shared
        self.largest = max(self.work, key=_numbers)
        #: That with the largest batch.
        self.trained = max(
            [self.largest, *([general] if general else [])], key=lambda w: self._batch_size(w) * _numbers(w)
        )

    def _once(self, key: Any, measure: Callable[[], Measured]) -> Measured:
        """Return a measurement, which methods for which the key is the same share.

        Args:
            key: everything that the measurement depends on and that differs between a run's methods.
            measure: makes it.
        """
        if key not in self.shared:
            self.shared[key] = measure()
        return self.shared[key]

    def _pass_key(self, *more: Any) -> Any:
        """Return what a pass over a batch of training depends on that differs between methods.

        Args:
            more: whatever else it depends on.
        """
        training = self.training
        names = "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"
        kwargs = [training.get(name) for name in names]
        batch = self.trained.name, self._batch_size(self.trained)
        return repr((more, batch, autocast_dtype(training), recomputes(training), kwargs))

    def _trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained; call it inside `_adapters`."""
        return [p for p in self.family.model.parameters() if p.requires_grad]

    @contextmanager
    def _fake_model(self) -> Iterator[Any]:
        with metered() as meter, faked(self.family.model):
            meter.peak = meter.live
            yield meter

    def _modules(self) -> dict[str, nn.Linear]:
        return {name: layer.module for name, layer in self.layers.items()}

    def _batch_size(self, work: Work) -> int:
        return min(int(self.training.get("per_device_train_batch_size", 8)), work.train)

    def _batch(self) -> dict[str, Tensor]:
        return repeated(self.trained.example, self._batch_size(self.trained))

    def _task(self) -> nn.Module:
        return self.family.workload_task(self.trained)

    def _question_features(self, size: int) -> Tensor:
        """Return features of copies of the longest question as the model's own predictor takes them."""
        model: Any = self.family.model
        batch = to_dtype(repeated(self.largest.question, size), model.dtype)
        if self.largest.prompts:
            prompt_features(model, self.largest.prompts)
            return image_features(model, **batch).float()
        return question_features(model, batch, [0])

    def _context(self, index: int) -> TaskContext:
        """Return the context of a run's last task, which offers nothing that needs weights or data."""
        answers = _Repeated(self.largest)
        ctx = TaskContext(
            index, self.largest.name, self.layers, _refuse_pass, _refuse_pass, 0, 0, tasks=index
        )
        ctx.model = self.family.model
        ctx.own_answers = lambda: answers
        return ctx

    @contextmanager
    def _loss_of(self, task: nn.Module) -> Iterator[Callable[[dict[str, Tensor]], Tensor]]:
        """Provide the loss of a batch in the last task; inside `_adapters` and `_fake_model`.

        The method's own if it says what it holds then (`planned_state`), else the task's.
        """
        tasks = len(self.work) - 1
        state = self.method.planned_state(self.layers, tasks)
        task.train()
        if state is None or self.method.plain_step:
            yield lambda batch: task(**batch)["loss"]
            return
        self.method.load_state_dicts([state])
        model = self.family.model
        ctx = self._context(tasks + 1)
        ctx.forward = task
        with self.method.training_context(ctx, model):
            yield lambda batch: self.method.loss(ctx, batch, task(**batch))
        self.method.load_state_dicts([])

    def _inits(self) -> Mapping[str, AdapterInit]:
        """Return adapters of the shapes that training uses."""
        if self.planned is not None:
            return self.planned
        if self.subspaces:
            return {name: AdapterInit(_rank(layer), layer.alpha) for name, layer in self.layers.items()}
        return self.method.init_adapters(self._context(1))

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        """Attach the adapters that training uses to the skeleton, for the length of a block."""
        model, ctx, inits = self.family.model, self._context(1), self._inits()
        with torch.device("meta"):
            wrapper = attach(model, inits, self.method.dropout)
        stack = ExitStack()
        try:
            if self.planned is not None:
                stack.enter_context(self.method.training_context(ctx, model))
            for module in self.changed.full.values():
                module.requires_grad_(True)
            if self.sharding.stage is not None:
                # DeepSpeed turns the whole model into one precision.
                for p in self._trained_parameters():
                    p.data = p.data.to(self.dtype)
            if recomputes(self.training):
                self._task().activation_checkpointing_enable()
            yield
        finally:
            if getattr(model, "is_activation_checkpointing", False):
                model.activation_checkpointing_disable()
            stack.close()
            detach(wrapper)
            model.eval().requires_grad_(False)


def _numbers(work: Work) -> int:
    """Return the tokens of a task's largest example, or of all class prompts."""
    return work.tokens * (len(work.prompts["input_ids"]) if work.prompts else 1)


class _Repeated:
    """Copies of a task's largest example, in the place of its questions with the model's own answers."""

    def __init__(self, work: Work):
        self._work = work

    def __len__(self) -> int:
        return self._work.train

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return repeated(self._work.example, len(indices))


def _rank(layer: Layer) -> int:
    return min(layer.rank, layer.module.in_features, layer.module.out_features)


def _refuse_pass(*args: Any, **kwargs: Any) -> Any:
    """Refuse a method that calls for a pass over data.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "this method initializes its adapters from data, which a plan does not read", "run it without a plan"
    )
