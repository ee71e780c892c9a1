"""KeepLoRA without the driver: protected subspaces for any model, around anyone's training loop.

A task is two calls. `begin_task` computes A from the task's first-step gradient outside of the protected
subspaces and returns a PEFT model of which only B is trained; `end_task` merges the update and extends the
subspaces by the task's feature directions. The mathematics is that of `llava_keeplora.methods.keeplora`
(arXiv 2601.19659); this module provides what the driver provides there: batches, passes, weights.

Legend: in / out features of a layer, r rank, k protected dimensions.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import (
    AdapterInit,
    BaseWeights,
    Delta,
    attach,
    detach,
    lora_layers,
    read_adapters,
    since_start,
)
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.deepspeed_zero import forget_engine, trained_values
from llava_keeplora.errors import ConfigError, MethodError, nearest
from llava_keeplora.memory import store
from llava_keeplora.memory.batch_task import BatchTask, Loss, MaskedStatistic
from llava_keeplora.memory.fingerprint import find_changed, fingerprint, frozen_fingerprints
from llava_keeplora.memory.targets import SETTINGS, Targets, find_target_layers, part_settings
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.models.task_model import blocks_recomputing
from llava_keeplora.run_folder import Capacity

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A finished task of a memory.

    Args:
        name: its name.
        deltas: layer name → its update.
        report: the numbers of its A and of its features, as the driver writes them; see docs/run-folder.md.
    """

    name: str
    deltas: Mapping[str, Delta]
    report: Mapping[str, Any]


@dataclass
class _Open:
    """The task that has begun: its adapters, and what must not change until it ends."""

    name: str
    loss: Loss | None
    wrapper: PeftModel
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
        if lora_layers(model):
            raise MethodError(
                "the model has LoRA layers, and the memory protects the weights below them",
                "merge them (merge_and_unload) or remove them (unload) first",
            )
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
        self.method: Any = cls(cls.Options(**options))
        self.method.check(self.layers)
        self._base_weights = {name: fingerprint(layer.module.weight) for name, layer in self.layers.items()}
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
        if self._open is not None:
            raise MethodError(
                f"task '{self._open.name}' has begun and has not ended",
                "call end_task, or cancel_task to drop its training",
            )
        index = len(self.tasks) + 1
        name = f"task-{index}" if name is None else str(name)
        if name in {task.name for task in self.tasks}:
            raise MethodError(f"there is a task '{name}' already", "give another name")
        report: dict[str, Any] = {}
        task = BatchTask(self.model, batches, loss)
        scale = task.scale()
        with self._passing():
            ctx = self._context(index, name, report)
            ctx.gradients = lambda fraction, statistics: self._gradients(task, scale, fraction, statistics)
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
            task.deltas = self._read(task)
            self._remove_adapters(task)
            self._apply(task.deltas)
        features = (
            _update_features(task.deltas)
            if batches is None
            else self._feature_pass(BatchTask(self.model, batches, task.loss))
        )
        index = len(self.tasks) + 1
        with self._passing():
            self._after_task(index, task.name, task.report, features)
        task.report["features_of"] = "update" if batches is None else "data"
        self.states.append(self.method.state_dict())
        self.tasks.append(Task(task.name, task.deltas, task.report))
        self._open = None
        return self.model

    def cancel_task(self) -> nn.Module:
        """Remove the adapters of the task that has begun, and go back to the model before it.

        Raises:
            MethodError: if no task has begun, or its update has been merged.
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

    @property
    def base_name(self) -> str | None:
        """The folder or Hub id that transformers loaded the base from; None for other models."""
        return getattr(getattr(self.model, "config", None), "name_or_path", None) or None

    def settings(self) -> dict[str, Any]:
        """Return what the memory was made with, and of which base, as JSON values."""
        return {
            "arguments": self._arguments,
            "options": self.options,
            "base": {
                "model": type(self.model).__name__,
                "name_or_path": self.base_name,
                "weights": self._base_weights,
            },
            "base_report": self._base_report,
        }

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Write the memory, of all finished tasks, into a folder; the model's own weights are not in it.

        Raises:
            MethodError: if a task has begun and has not ended.
        """
        if self._open is not None:
            raise MethodError(
                f"task '{self._open.name}' has begun and has not ended, so the memory isn't whole",
                "call end_task or cancel_task first; the adapter itself is saved by model.save_pretrained",
            )
        return store.save(self, Path(folder))

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
        record, states, tasks = store.load(folder)
        memory = cls.__new__(cls)
        memory._prepare(model, **record["arguments"], options=record["options"])
        store.check_base(memory, record)
        memory._base_report, memory.states = record["base_report"], states
        memory.tasks = [Task(**task) for task in tasks]
        memory.method.load_state_dicts(states)
        memory._apply()
        return memory

    def push_to_hub(self, repo_id: str) -> str:
        """Write the memory into a model repository on the Hub, which is created if it doesn't exist.

        Returns:
            the repository's URL.
        """
        return store.push(self, repo_id)

    # --- inside ------------------------------------------------------------------------------------------

    def _require_open(self, verb: str) -> _Open:
        if self._open is None:
            raise MethodError(f"no task has begun, so there is none to {verb}", "call begin_task first")
        return self._open

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

    def _gradients(
        self, task: BatchTask, scale: float, fraction: float, statistics: Mapping[str, Any]
    ) -> None:
        layers = {name: layer.module for name, layer in self.layers.items()}
        gradient_pass(task, layers, _part_of(task.batches, fraction), scale, statistics)

    def _feature_pass(self, task: BatchTask) -> Callable[..., Mapping[str, Any]]:
        layers = {name: layer.module for name, layer in self.layers.items()}
        parts = {name: layer.part for name, layer in self.layers.items()}

        def features(make: Callable[[list[list[str]]], Mapping[str, Any]], fraction: float = 1.0):
            def masked(groups: list[list[str]]) -> dict[str, MaskedStatistic]:
                statistics = make(groups)
                of = {id(s): MaskedStatistic(s, task) for s in statistics.values()}
                return {name: of[id(s)] for name, s in statistics.items()}

            task.scale()  # Refuses data without a batch.
            seen: Mapping[str, Any] = feature_pass(
                task, layers, parts, _part_of(task.batches, fraction), masked
            )
            return {name: of_layer.statistic for name, of_layer in seen.items()}

        return features

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Freeze the model in evaluation mode while a pass runs, and give it back as it was."""
        modes = {module: module.training for module in self.model.modules()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval().requires_grad_(False)
        try:
            with blocks_recomputing(self.model):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for p in trained:
                p.requires_grad_(True)

    def _apply(self, *deltas: Mapping[str, Delta], offset: Mapping[str, Delta] | None = None) -> None:
        self._base.apply([*(task.deltas for task in self.tasks), *deltas, offset or {}])

    def _remove_adapters(self, task: _Open) -> None:
        forget_engine(self.model.parameters())
        detach(task.wrapper)
        for p in task.trainable:
            p.requires_grad_(True)

    def _read(self, task: _Open) -> dict[str, Delta]:
        """Return the update, after a check that training changed B, all of it, and nothing but B."""
        layers = lora_layers(self.model)
        if missing := sorted(set(task.inits) - set(layers)):
            raise MethodError(
                f"{len(missing)} of {len(task.inits)} layers of task '{task.name}' have lost their adapters, "
                f"first {missing[0]}",
                "end the task before the adapters are merged or unloaded; begin it again with cancel_task",
            )
        for name, init in task.inits.items():
            weight = layers[name].lora_A["default"].weight
            assert init.A is not None
            if not torch.equal(trained_values(weight).cpu().to(weight.dtype), init.A.to(weight.dtype)):
                raise MethodError(
                    f"training moved A of {name}, which keeps task '{task.name}' outside of the "
                    "protected subspace",
                    "freeze it again with llava_keeplora.freeze_A(model) after adapters are loaded, and train "
                    "from begin_task's model",
                )
        if moved := find_changed(self.model, task.frozen):
            raise MethodError(
                f"training changed {len(moved)} frozen tensors of the model, first {moved[0]}, which belong "
                "to no update",
                "train B alone: load the model in the dtype that it is trained in, and keep other "
                "parameters, and statistics of normalisation layers, fixed",
            )
        deltas = {
            name: since_start(delta, task.inits[name])
            for name, delta in read_adapters(self.model, task.inits).items()
            if name in task.inits
        }
        for name, delta in deltas.items():
            if not torch.isfinite(delta.B).all():
                raise MethodError(
                    f"B of {name} is not finite after the training of task '{task.name}'",
                    "cancel_task and train again with a lower learning rate",
                )
        if not any(bool(delta.B.any()) for delta in deltas.values()):
            raise MethodError(
                f"no adapter of task '{task.name}' has changed since begin_task",
                "train the model that begin_task returned, or call cancel_task",
            )
        return deltas


def _no_data(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this stage of a task has no data")


def _part_of(batches: Callable[[], Iterator[Any]], fraction: float) -> Iterator[Any]:
    """Yield a fraction of the batches, evenly spaced from the first on."""
    for index, batch in enumerate(batches()):
        if index == 0 or int(index * fraction) > int((index - 1) * fraction):
            yield batch


def _update_features(deltas: Mapping[str, Delta]) -> Callable[..., Mapping[str, Any]]:
    """Return a feature pass over the rows of the updates, which are the directions that they read."""

    def features(make: Callable[[list[list[str]]], Mapping[str, Any]], fraction: float = 1.0):
        statistics = make([[name] for name in deltas])
        for name, statistic in statistics.items():
            change = deltas[name]
            # B = QR: the rows of R A have the second moment of those of B A.
            r = torch.linalg.qr(change.B.double()).R
            statistic.add((change.scale * r @ change.A.double()).float(), None)
        return statistics

    return features


def _log_left_out(name: str, left_out: Mapping[str, str]) -> None:
    for reason in sorted(set(left_out.values())):
        layers = [layer for layer, why in left_out.items() if why == reason]
        logger.warning("%s: %d layers are not adapted, first %s: %s", name, len(layers), layers[0], reason)
