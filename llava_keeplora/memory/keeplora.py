"""KeepLoRA without the driver: protected subspaces for any model, around anyone's training loop.

A task is two calls. `begin_task` computes A from the task's first-step gradient outside of the protected
subspaces and returns a PEFT model of which only B is trained; `end_task` merges the update and extends the
subspaces by the task's feature directions. The mathematics is that of `llava_keeplora.methods.keeplora`
(arXiv 2601.19659); this module provides what the driver provides there: batches, passes, weights.

Legend: in / out features of a layer, r rank, k protected dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llava_keeplora.adapters import (
    AdapterInit,
    BaseWeights,
    Delta,
    attach,
    detach,
    lora_layers,
    removed_energy,
)
from llava_keeplora.adopt.peft_adapter import read_adapter
from llava_keeplora.adopt.source import ADAPTER as ADAPTER_SOURCE
from llava_keeplora.adopt.source import find_source
from llava_keeplora.coerce import coerce_fields
from llava_keeplora.deepspeed_zero import forget_engine
from llava_keeplora.errors import ConfigError, MethodError, nearest
from llava_keeplora.memory import passes, store
from llava_keeplora.memory.batch_task import BatchTask, Loss
from llava_keeplora.memory.fingerprint import fingerprint, frozen_fingerprints
from llava_keeplora.memory.store import Task
from llava_keeplora.memory.targets import SETTINGS, Targets, find_target_layers, part_settings
from llava_keeplora.memory.update import read_update
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.models.quantization import keep_form
from llava_keeplora.run_folder import Capacity

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


@dataclass
class _Open:
    """The task that has begun: its adapters, and what must not change until it ends."""

    name: str
    loss: Loss | None
    wrapper: PeftModel | None
    inits: dict[str, AdapterInit]
    frozen: dict[str, str]
    #: The model's parameters that were trainable before the task, and are again after it.
    trainable: list[nn.Parameter]
    report: dict[str, Any]
    #: The task's update, once it is read from the adapters and merged.
    deltas: dict[str, Delta] | None = None


class KeepLora:
    """Protected subspaces of a model's linear layers, which grow with every task.

    The pre-trained weights' principal directions are protected from the start. The model is changed in
    place: adapters are put on its layers while a task trains, and its weights are the base's plus the
    updates of the finished tasks, summed in float32 and rounded once.

    Args:
        model: any `nn.Module` with linear layers, with its pre-trained weights; quantised by bitsandbytes or
            not.
        targets: the layers, as PEFT's `target_modules`: last components of names, a regular expression, or
            `all-linear`; or part → settings, for instance
            `{"vision": {"targets": ["qkv"], "energy_weight": 0.5}}`.
        rank: r, the rank of a task's update.
        alpha: the update is scaled by alpha / r; r when None.
        energy_weight: ε_w in (0, 1], the fraction of each weight's energy that is protected.
        energy_feature: ε_f in (0, 1], the fraction of each task's feature energy that is protected.
        seed: seed of sketches and random directions.
        statistics_gb: memory limit for the statistics of a feature pass, in gigabytes.
        options: of the method, see `llava_keeplora.methods.keeplora.KeepLora.Options`; for instance
            `gradient_fraction=0.25`.

    Raises:
        ConfigError, MethodError: for targets or settings that the model cannot follow.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets = "all-linear",
        rank: int = 16,
        alpha: float | None = None,
        energy_weight: float = 0.85,
        energy_feature: float = 0.99,
        seed: int = 0,
        statistics_gb: float = 8.0,
        **options: Any,
    ):
        self._prepare(
            model,
            targets=targets,
            rank=rank,
            alpha=alpha,
            energy_weight=energy_weight,
            energy_feature=energy_feature,
            seed=seed,
            statistics_gb=statistics_gb,
            options=options,
        )
        self.method.check_weights(self.layers)
        self._base_report: dict[str, Any] = {}
        self._after_task(0, "base", self._base_report, lambda make, fraction=1.0: {})
        self.states.append(self.method.state_dict())

    def _prepare(self, model: nn.Module, *, options: Mapping[str, Any], **arguments: Any) -> None:
        """Find and check the layers, before any subspace is computed or read."""
        if not isinstance(model, nn.Module):
            raise MethodError(
                f"model is a {type(model).__name__}, and a memory is of a torch.nn.Module",
                "give what from_pretrained returns",
            )
        if lora_layers(model):
            raise MethodError(
                "the model has LoRA layers, and the memory protects the weights below them",
                "merge them (merge_and_unload) or remove them (unload) first",
            )
        keep_form(model)
        cls = METHODS["keeplora"]
        if unknown := set(options) - {option.name for option in dataclasses.fields(cls.Options)}:
            names = [option.name for option in dataclasses.fields(cls.Options)]
            raise ConfigError(f"KeepLora has no setting '{min(unknown)}'", nearest(min(unknown), names))
        self.model, self.options = model, dict(options)
        self.seed, self.statistics_gb = arguments["seed"], arguments["statistics_gb"]
        defaults = {key: arguments[key] for key in SETTINGS if key != "targets"}
        parts = part_settings(arguments["targets"], defaults)
        self._arguments = {**arguments, "targets": parts}
        self.layers = find_target_layers(model, parts)
        self.method: Any = cls(cls.Options(**coerce_fields(cls.Options, options, "")))
        if self.method.distillation:
            raise MethodError(
                f"distillation is {self.method.distillation:g}, but it is a part of the training's loss, and "
                "the training is yours",
                "set distillation to 0, or preset to 'paper', and add its term to your loss (docs/method.md)",
            )
        if share := self.method.prototypes.rejection:
            raise MethodError(
                f"rejection is {share:g}, but it decides which model answers, and a memory leaves one model, "
                "whose answers are yours",
                "set rejection to 0",
            )
        self.method.check(self.layers)
        self._base_weights = {name: fingerprint(layer.module.weight) for name, layer in self.layers.items()}
        self._other_weights = {
            name: fingerprint(parameter)
            for name, parameter in model.named_parameters()
            if name.removesuffix(".weight") not in self.layers
        }
        self._base = BaseWeights({name: layer.module for name, layer in self.layers.items()})
        #: The finished tasks, in order.
        self.tasks: list[Task] = []
        #: What the base and each task added to the protected subspaces.
        self.states: list[dict[str, Tensor]] = []
        self._open: _Open | None = None

    # --- tasks -------------------------------------------------------------------------------------------

    def begin_task(
        self, batches: Iterable[Any], loss: Loss | None = None, name: str | None = None
    ) -> PeftModel:
        """Compute A from the gradient of the task's mean loss, and put adapters on the model.

        Args:
            batches: the task's training data in batches that can be read several times (a DataLoader, a
                list); with several processes, this process's share. All of it, in any order; see the option
                `gradient_fraction`.
            loss: `loss(model, batch)` returns the mean loss of a batch as a tensor, or with it the batch's
                weight in the mean over all data; `model(**batch).loss` when None, which counts by its
                labels.
            name: of the task; `task-N` when None.

        Returns:
            the model as a `peft.PeftModel`, of which B is trained; A and all else are frozen.

        Raises:
            MethodError: if a task has begun already, or the data give no gradient.
        """
        self._require_closed()
        index, name = len(self.tasks) + 1, self._new_name(name)
        report: dict[str, Any] = {}
        task = BatchTask(self.model, batches, loss)
        scale = task.scale()
        with passes.frozen(self.model):
            ctx = self._context(index, name, report)
            ctx.gradients = functools.partial(passes.run_gradient_pass, task, self.layers, scale)
            inits = self.method.init_adapters(ctx)
        self._apply(offset=self.method.weight_offset(inits))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        wrapper = attach(self.model, inits, self.method.dropout)
        assert wrapper is not None  # `init_adapters` refuses a task without any adapter.
        frozen = frozen_fingerprints(self.model)
        self._open = _Open(name, loss, wrapper, inits, frozen, trainable, report)
        _log_left_out(name, report["left_out"])
        return wrapper

    def end_task(self, batches: Iterable[Any] | None = None) -> nn.Module:
        """Merge the task's update into the model, and protect the task's feature directions.

        If it fails, for instance because a batch cannot be read, nothing is lost: call it again.

        Args:
            batches: the task's training data, as in `begin_task`; without them, the directions that the
                update reads are protected instead, as no features are known.

        Returns:
            the plain model, merged.

        Raises:
            MethodError: if no task has begun, nothing was trained, a value is not finite, or training moved A
                or a frozen weight.
        """
        task = self._require_open("end")
        if task.deltas is None:
            update = read_update(self.model, task.name, task.inits, task.frozen)
            ctx = self._context(len(self.tasks) + 1, task.name, task.report)
            task.deltas = self.method.finalize_deltas(ctx, update)
            self._remove_adapters(task)
            self._apply(task.deltas)
        return self._protect(task, task.deltas, batches)

    def adopt_task(
        self,
        adapter: Path | str,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        name: str | None = None,
    ) -> nn.Module:
        """Take over a task that a PEFT adapter of the base, or of the model as it is now, has learned.

        Its update is projected off the protected subspaces, ΔW (I − M' M'ᵀ), merged, and protected in turn.
        The share of its energy that the projection takes away is in the task's report, as `adopted`.

        Args:
            adapter: a folder with a LoRA adapter of linear layers, or `user/name` on the Hub.
            batches, loss: the task's data, as in `begin_task` and `end_task`; without data the directions
                that the update reads are protected.
            name: of the task; `task-N` when None.

        Returns:
            the plain model, merged.

        Raises:
            RunError: if the adapter is damaged, is more than LoRA on linear layers, or doesn't fit the model.
            MethodError: if it changes layers that the memory does not protect, or nothing of it is left.
        """
        self._require_closed()
        name = self._new_name(name)
        source = find_source(str(adapter))
        if source.form != ADAPTER_SOURCE:
            raise MethodError(
                f"{adapter} is a merged checkpoint, and a memory adopts adapters",
                "adopt it into a run with `llava-keeplora adopt`",
            )
        linear = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        given = read_adapter(source.folder, linear)
        if beyond := [layer for layer in given if layer not in self.layers]:
            raise MethodError(
                f"{adapter} changes {len(beyond)} layers that this memory does not protect, first "
                f"{beyond[0]}",
                "make a memory whose targets name them",
            )
        ctx = self._context(len(self.tasks) + 1, name, {})
        taken = {n: d for n, d in self.method.project(ctx, given).items() if isinstance(d, Delta)}
        if not taken:
            raise MethodError(
                f"nothing of {adapter} is outside of what is protected",
                "adopt it into a memory with a lower energy_weight or energy_feature",
            )
        removed = removed_energy(given, taken, lambda layer: self.layers[layer].part)
        ctx.report["adopted"] = source.record() | removed
        logger.info("%s: the projection takes away %s of its energy", name, removed["removed"])
        self._open = _Open(name, loss, None, {}, {}, [], ctx.report, taken)
        try:
            self._apply(taken)
            return self._protect(self._open, taken, batches)
        except BaseException:
            self.cancel_task()
            raise

    def _protect(self, task: _Open, deltas: dict[str, Delta], batches: Iterable[Any] | None) -> nn.Module:
        """Extend the subspaces by what the merged task uses, and close it."""
        features: Callable[..., Any]
        if batches is None:
            features = functools.partial(passes.update_features, deltas)
        else:
            data = BatchTask(self.model, batches, task.loss)
            features = functools.partial(passes.run_feature_pass, data, self.layers)
        with passes.frozen(self.model):
            self._after_task(len(self.tasks) + 1, task.name, task.report, features)
        task.report["features_of"] = "update" if batches is None else "data"
        self.states.append(self.method.state_dict())
        self.tasks.append(Task(task.name, deltas, task.report))
        self._open = None
        return self.model

    def cancel_task(self) -> nn.Module:
        """Drop the task that has begun, and go back to the model before it.

        Raises:
            MethodError: if no task has begun.
        """
        task = self._require_open("cancel")
        if task.deltas is None:
            self._remove_adapters(task)
        self._apply()
        self._open = None
        return self.model

    def capacity(self) -> dict[str, Capacity]:
        """Return layer name → its input width and its number of protected directions."""
        protected = self.method.capacity()
        return {name: layer.capacity(protected[name]) for name, layer in self.layers.items()}

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Write the memory, of all finished tasks, into a folder; the model's own weights are not in it.

        Raises:
            MethodError: if a task has begun and has not ended.
        """
        self._require_closed()
        return store.save(self._contents(), self.model, Path(folder))

    @classmethod
    def load(cls, model: nn.Module, folder: Path | str) -> KeepLora:
        """Read a memory, and put the model into the state after its last task.

        Args:
            model: the base, with the weights that the memory was made from.
            folder: of `save`, or `user/name` on the Hub.

        Raises:
            MethodError: if the model is not the memory's base.
            RunError: if the folder is damaged or is no memory.
        """
        contents = store.load(folder)
        memory = cls.__new__(cls)
        memory._prepare(model, **contents.record["arguments"], options=contents.record["options"])
        modules = {name: layer.module for name, layer in memory.layers.items()}
        store.check_base(contents, modules, memory._other_weights)
        memory._base_report = contents.record["base_report"]
        memory.states, memory.tasks = contents.states, contents.tasks
        memory.method.load_state_dicts(memory.states)
        memory._apply()
        return memory

    def push_to_hub(self, repo_id: str) -> str:
        """Write the memory into a model repository on the Hub, which is created if it doesn't exist.

        Returns:
            the repository's URL.
        """
        self._require_closed()
        return store.push(self._contents(), self.model, repo_id)

    def _contents(self) -> store.Contents:
        base = {
            "model": type(self.model).__name__,
            "name_or_path": getattr(getattr(self.model, "config", None), "name_or_path", None) or None,
            "weights": self._base_weights,
            "other_weights": self._other_weights,
        }
        record = {
            "arguments": self._arguments,
            "options": self.options,
            "base": base,
            "base_report": self._base_report,
        }
        return store.Contents(record, self.states, self.tasks)

    # --- inside ------------------------------------------------------------------------------------------

    def _require_open(self, verb: str) -> _Open:
        if self._open is None:
            raise MethodError(f"no task has begun, so there is none to {verb}", "call begin_task first")
        return self._open

    def _new_name(self, name: str | None) -> str:
        name = f"task-{len(self.tasks) + 1}" if name is None else str(name)
        if name in {task.name for task in self.tasks}:
            raise MethodError(f"there is a task '{name}' already", "give another name")
        return name

    def _require_closed(self) -> None:
        if self._open is not None:
            raise MethodError(
                f"task '{self._open.name}' has begun and has not ended",
                "call end_task, or cancel_task to drop its training",
            )

    def _context(self, index: int, name: str, report: dict[str, Any]) -> TaskContext:
        return TaskContext(
            index=index,
            name=name,
            layers=self.layers,
            gradients=_no_data,
            features=_no_data,
            seed=self.seed * 1000 + index,
            statistics_bytes=int(self.statistics_gb * 1e9),
            model=self.model,
            deltas=lambda: [task.deltas for task in self.tasks],
            report=report,
            base=self._base_report if index else {},
            tasks=index,
        )

    def _after_task(
        self, index: int, name: str, report: dict[str, Any], features: Callable[..., Any]
    ) -> None:
        ctx = self._context(index, name, report)
        ctx.features = features
        self.method.after_task(ctx)

    def _apply(self, *deltas: Mapping[str, Delta], offset: Mapping[str, Delta] | None = None) -> None:
        self._base.apply([*(task.deltas for task in self.tasks), *deltas, offset or {}])

    def _remove_adapters(self, task: _Open) -> None:
        forget_engine(self.model.parameters())
        detach(task.wrapper)
        for p in task.trainable:
            p.requires_grad_(True)


def _no_data(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this stage of a task has no data")


def _log_left_out(name: str, left_out: Mapping[str, str]) -> None:
    for reason in sorted(set(left_out.values())):
        layers = [layer for layer, why in left_out.items() if why == reason]
        logger.warning("%s: %d layers are not adapted, first %s: %s", name, len(layers), layers[0], reason)
