"""A run's memory, disk space and steps as dataclasses, and the smallest change that makes it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llava_keeplora.config import RunConfig, deepspeed_config, make_method
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods import Layer, Method
from llava_keeplora.methods.layers import unsure_layers
from llava_keeplora.methods.shares import most_read
from llava_keeplora.models import Family, Work, open_model
from llava_keeplora.plan.machine import (
    Machine,
    changed_layers,
    find_machine,
    kept_bytes,
    sketching,
    takes_whole_gradient,
)
from llava_keeplora.plan.memory_estimate import F32, MemoryEstimate
from llava_keeplora.plan.sharding import read_sharding
from llava_keeplora.plan.sizes import second_training
from llava_keeplora.plan.workload import read_general_work, read_work
from llava_keeplora.run_folder import Stage
from llava_keeplora.start.check import check_processes
from llava_keeplora.steps import Budget
from llava_keeplora.subspace import guaranteed_room

#: Dotted key of a setting → value; the key `gpus` is the machine's number of GPUs.
Changes = Mapping[str, Any]
BATCH, ACCUMULATION, DEEPSPEED = (
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.deepspeed",
)
CHECKPOINTING, EVALUATION, STATISTICS = (
    "training.gradient_checkpointing",
    "evaluation.batch_size",
    "memory.statistics_gb",
)
#: Most GPUs that a plan proposes.
MOST_GPUS = 8


@dataclass(frozen=True)
class StagePlan:
    """Estimate for one stage.

    Args:
        stage: its name.
        device: peak bytes on each GPU; of the process on a machine without GPUs.
        host: peak bytes in host memory of a process that has a GPU; 0 on a machine without GPUs.
        fits: whether the device has enough memory. Host memory next to GPUs is reported but not judged, as
            the run may take place on another machine.
        changes: settings with which this stage and all before it fit; None where no such settings are known,
            or none are needed.
    """

    stage: str
    device: int
    host: int
    fits: bool
    changes: Changes | None = None


@dataclass(frozen=True)
class MethodPlan:
    """Estimate for one method of a run.

    Args:
        label: the method's label.
        stages: its stages, in their order.
        trainable: how many numbers are trained in a task.
        stored: how many numbers a task's delta has.
        disk_task: bytes that a task adds to the run folder.
        disk_base: bytes in the run folder before the first task.
        steps: optimiser steps of every task.
        unsure: a sentence on a rank that a start may refuse after loading the weights; empty if every rank is
            certain to fit.
        reading: a sentence on how much of the data the passes read at most; empty if settings fix it.
        uncounted: a sentence on what the figures leave out; empty for nothing.
    """

    label: str
    stages: tuple[StagePlan, ...]
    trainable: int
    stored: int
    disk_task: int
    disk_base: int
    steps: tuple[int, ...]
    unsure: str = ""
    reading: str = ""
    uncounted: str = ""


@dataclass(frozen=True)
class Plan:
    """Estimate for a run.

    Args:
        machine: the machine that it is planned for.
        model: bytes of the model.
        tasks: names of the tasks.
        examples: training examples of every task.
        assumed: tasks whose number of examples is assumed, as their data are not there and none is known.
        methods: an estimate for each method.
        left_out: label → why a method is not planned.
        changes: settings with which everything fits; empty where none are needed, None where none of those
            tried is enough.
    """

    machine: Machine
    model: int
    tasks: tuple[str, ...]
    examples: tuple[int, ...]
    assumed: tuple[str, ...]
    methods: tuple[MethodPlan, ...]
    left_out: Mapping[str, str]
    changes: Changes | None

    @property
    def fits(self) -> bool:
        """Whether every stage of every method fits."""
        return all(stage.fits for method in self.methods for stage in method.stages)


def make_plan(config: RunConfig, gpus: int | None = None, gpu_memory_gb: float | None = None) -> Plan:
    """Estimate peak memory of every stage, disk space, parameters and steps, without loading weights.

    Methods that can't be rehearsed without data are left out, and so are those that do not run in as many
    processes or with the sharding; `Plan.left_out` lists them.

    Args:
        config: the run.
        gpus: number of GPUs to plan for; the CPU of this machine when None.
        gpu_memory_gb: memory of each GPU, in 10⁹ bytes; that of this machine's when None.

    Raises:
        ConfigError: the configuration, the model or the machine is not valid, or no method can be planned.
        RecipeError: a recipe or its data are not valid.
    """
    if not config.methods:
        raise ConfigError(
            "no method of the run learns anything, so there is nothing to plan", "name one under methods"
        )
    machine = find_machine(gpus, gpu_memory_gb)
    refused = _refused(config, max(1, machine.gpus))
    config = dataclasses.replace(
        config, methods={label: row for label, row in config.methods.items() if label not in refused}
    )
    # Whatever a start would refuse is refused first, also where nothing can be estimated.
    scenarios = _Scenarios(config, machine)
    left_out = {
        label: why for label, method in config.methods.items() if (why := _unplanned(make_method(method)))
    }
    if len(left_out) == len(config.methods):
        label, why = next(iter(left_out.items()))
        raise ConfigError(f"'{label}' {why}", "run it without a plan")
    estimates, methods = scenarios.at({}), []
    changes: Mapping[str, Any] | None = {}
    for label, estimate in estimates.items():
        stages = []
        for stage in estimate.stages:
            fits, peak = scenarios.fits({}, label, stage), estimate.peak(stage)
            if not fits and changes is not None:
                changes = next(scenarios.fitting(changes, label, stage), None)
            stages.append(StagePlan(stage, peak.device, peak.host, fits, None if fits else changes))
        methods.append(_method_plan(label, estimate, tuple(stages), max(1, scenarios.machine.gpus)))
    work = scenarios.work
    return Plan(
        scenarios.machine,
        estimate.model_bytes,
        tuple(w.name for w in work),
        tuple(w.train for w in work),
        tuple(w.name for w in work if w.assumed),
        tuple(methods),
        refused | left_out,
        changes,
    )


def _refused(config: RunConfig, world: int) -> dict[str, str]:
    """Return label → why a start in these processes would refuse the row (the predicate of a sentence).

    Raises:
        ConfigError: every row would be refused.
    """
    sharded = ((deepspeed_config(config) or {}).get("zero_optimization") or {}).get("stage") == 3
    changed = changed_layers(config, open_model(config.model, config.evaluation)) if sharded else {}
    refused: dict[str, str] = {}
    for label, row in config.methods.items():
        layers = changed[label].adapted.values() if label in changed else ()
        try:
            check_processes(label, make_method(row), layers, world, sharded)
        except ConfigError as error:
            if len(refused) == len(config.methods) - 1:
                raise
            refused[label] = f"is refused by a start: {str(error).rstrip('.')}"
    return refused


def _unplanned(method: Method) -> str | None:
    """Return why a plan cannot estimate a method (the predicate of a sentence); None where it can."""
    if not method.uses_lora:
        return "does not train LoRA adapters, and a plan estimates nothing else"
    reads = Stage.PREPARED in method.stage_cost and method.planned_state({}, 0) is None
    if reads and method.subspace_plan() is None:
        return "initializes its adapters from data, which a plan does not read"
    return None


def _method_plan(
    label: str, estimate: MemoryEstimate, stages: tuple[StagePlan, ...], world: int
) -> MethodPlan:
    config, work = estimate.config, estimate.work
    adapters = _initial_adapters(estimate)
    budgets = [
        Budget.of(training, w.train, world) for w, training in zip(work, config.trainings(label), strict=True)
    ]
    growth = (estimate.bases(len(work)) - estimate.bases(0)) // len(work)
    answers = sum(w.predictions for w in work)
    return MethodPlan(
        label,
        stages,
        estimate.trainable,
        estimate.delta_numbers,
        F32 * estimate.delta_numbers + adapters + growth + estimate.state_growth + answers,
        estimate.bases(0) + answers,
        tuple(estimate.method.budget(index, budgets).steps for index in range(1, len(work) + 1)),
        _unsure_rank(estimate.layers.values()) if estimate.protects_weights else "",
        most_read(estimate.method, budgets),
        second_training(estimate.method, budgets),
    )


def _initial_adapters(estimate: MemoryEstimate) -> int:
    """Return the bytes of the initial adapters that a run keeps per task: A alone, or A and B."""
    if not estimate.subspaces and estimate.planned is None:
        return 0
    return sum(
        F32 * layer.rank * (layer.module.in_features + (layer.module.out_features if estimate.planned else 0))
        for layer in estimate.layers.values()
    )


def _unsure_rank(layers: Iterable[Layer]) -> str:
    """Return a sentence on the first of the `unsure_layers`; empty if there is none."""
    layer = next(iter(unsure_layers(layers)), None)
    if layer is None:
        return ""
    out_dim, in_dim = layer.module.out_features, layer.module.in_features
    sure = guaranteed_room(out_dim, in_dim, layer.energy_weight)
    return (
        f"whether rank {layer.rank} fits layer {layer.name} depends on its weights, which `train` looks at "
        f"before its first stage: energy_weight {layer.energy_weight:g} protects some of its {in_dim} input "
        f"directions; a rank up to {sure} is sure to fit"
    )


class _Scenarios:
    """Estimates of a run under changed settings, each computed when it is first needed.

    Args:
        config: the run as it is.
        machine: the machine that it is planned for.
    """

    def __init__(self, config: RunConfig, machine: Machine):
        self.config, self.machine = config, machine
        self._estimates: dict[str, dict[str, MemoryEstimate]] = {}
        self.work: list[Work] = []
        self._generals: dict[str, Work | None] = {}
        self.at({})

    def at(self, changes: Changes) -> dict[str, MemoryEstimate]:
        """Return label → estimate under some changes."""
        key = repr(sorted(changes.items()))
        if key not in self._estimates:
            self._estimates[key] = self._estimate(
                _changed(self.config, changes), changes.get("gpus", self.machine.gpus)
            )
        return self._estimates[key]

    def _estimate(self, config: RunConfig, gpus: int) -> dict[str, MemoryEstimate]:
        family = open_model(config.model, config.evaluation)
        changed = changed_layers(config, family)
        self.work = self.work or read_work(config, family, changed, max(1, gpus))
        text = getattr(family.model.config, "text_config", family.model.config)
        sharding = read_sharding(deepspeed_config(config), max(1, gpus), text.hidden_size)
        base_copies = 0 if sharding.partitions else kept_bytes(changed.values())
        planned = {
            label: method for label, method in config.methods.items() if not _unplanned(make_method(method))
        }
        general = {label: self._general(config, label, family) for label in planned}
        shared: dict[Any, Any] = {}
        return {
            label: MemoryEstimate(
                config, method, family, self.work, sharding, gpus == 0, base_copies, general[label], shared
            )
            for label, method in planned.items()
        }

    def _general(self, config: RunConfig, label: str, family: Family) -> Work | None:
        """Return what a method's general data ask of the machine; they are read once."""
        if label not in self._generals:
            self._generals[label] = read_general_work(config, label, family)
        return self._generals[label]

    def fits(self, changes: Changes, label: str, stage: str) -> bool:
        """Return whether a stage fits under some changes."""
        try:
            return self.at(changes)[label].peak(stage).device <= self.machine.available
        except (ConfigError, MethodError):
            # Statistics that are too small for a sketch, settings that exclude each other, or a method that
            # takes no quantised layers.
            if not changes:
                raise
            return False

    def fitting(self, start: Changes, label: str, stage: str) -> Iterator[Changes]:
        """Yield changes on top of those of `start` with which a stage fits, the smallest first."""
        for heavy in self._heavy(start):
            base = {**start, **heavy}
            lights = [{}, *self._light(_changed(self.config, base), label, stage)]
            # The last one takes the least memory; where even that is too much, the others needn't be tried.
            # Not so for features, where a small budget may be too small for any sketch.
            if stage == "features" or self.fits({**base, **lights[-1]}, label, stage):
                yield from (
                    {**base, **light} for light in lights if self.fits({**base, **light}, label, stage)
                )

    def _light(self, config: RunConfig, label: str, stage: str) -> list[Changes]:
        """Return changes to how a step is computed, from the smallest to the one that saves most."""
        batches = list(_smaller_batches(config.methods[label].training))
        if stage == "statistics":  # one example at a time already
            return [{CHECKPOINTING: True}]
        if stage in ("gradient", "train"):
            more = {CHECKPOINTING: True}
            lights = batches + [more, *({**more, **batch} for batch in batches)]
            sketch = {f"methods.{label}.gradient": "sketch"}
            return (
                [sketch, *({**sketch, **light} for light in lights)]
                if stage == "gradient" and takes_whole_gradient(config, label)
                else lights
            )
        if stage == "features":
            budgets = [{STATISTICS: config.memory.statistics_gb / 2**i} for i in range(1, 5)]
            return batches + budgets
        return (
            [
                {EVALUATION: config.evaluation.batch_size // 2**i}
                for i in range(1, 8)
                if config.evaluation.batch_size >> i
            ]
            if stage == "evaluate"
            else []
        )

    def _heavy(self, start: Changes) -> Iterator[Changes]:
        """Yield no change, half precision, a quantised base, ZeRO-2 and ZeRO-3, and then more GPUs."""
        config = _changed(self.config, start)
        half = {} if config.model.dtype == "bfloat16" else {"model.dtype": "bfloat16"}
        yield {}
        if deepspeed_config(config) is None:
            yield from [half] if half else []
            yield from (
                {**half, "model.quantization": kind}
                for kind in ("int8", "nf4")
                if not config.model.quantization
            )
        gpus = max(1, start.get("gpus", self.machine.gpus))
        # Without it, the DeepSpeed configuration's bf16 would contradict the training arguments.
        bf16 = (
            {}
            if all(method.training.get("bf16") for method in config.methods.values())
            else {"training.bf16": True}
        )
        while self.machine.gpus and gpus <= MOST_GPUS:
            more = {"gpus": gpus} if gpus > self.machine.gpus else {}
            for stage in (2, 3) if gpus > 1 else ():
                yield {
                    **more,
                    **half,
                    **bf16,
                    **_same_examples(config, gpus // self.machine.gpus),
                    DEEPSPEED: _zero(stage),
                }
            gpus *= 2


def _zero(stage: int) -> dict[str, Any]:
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, **auto}


def _smaller_batches(training: Mapping[str, Any]) -> Iterator[Changes]:
    """Return smaller and smaller batches, with as many accumulation steps as keep the examples of a step."""
    size, steps = (
        int(training.get("per_device_train_batch_size", 8)),
        int(training.get("gradient_accumulation_steps", 1)),
    )
    halves = (size >> i for i in range(1, size.bit_length()))
    return ({BATCH: half, ACCUMULATION: size * steps // half} for half in halves if size * steps % half == 0)


def _same_examples(config: RunConfig, factor: int) -> Changes:
    """Return the batch settings with which `factor` times the processes keep the examples of a step.

    Empty where the examples of a step cannot be divided by the factor.
    """
    training = next(iter(config.methods.values())).training
    size, steps = (
        int(training.get("per_device_train_batch_size", 8)),
        int(training.get("gradient_accumulation_steps", 1)),
    )
    if factor == 1 or size * steps % factor:
        return {}
    batch = math.gcd(size, size * steps // factor)
    return {BATCH: batch, ACCUMULATION: size * steps // factor // batch}


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    """Return a run's configuration with some settings replaced, in every method."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if section == "training":
            methods = {
                label: dataclasses.replace(m, training={**m.training, name: value})
                for label, m in config.methods.items()
            }
            config = dataclasses.replace(config, methods=methods, training={**config.training, name: value})
        elif section == "methods":
            config = sketching(config, name.rpartition(".")[0])
        elif name:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
    return config
