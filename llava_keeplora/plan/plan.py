"""A run's memory, disk and steps as plain data, and the smallest change that makes it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llava_keeplora.config import RunConfig, deepspeed_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Layer, Method
from llava_keeplora.models import open_model
from llava_keeplora.plan.machine import (
    Machine,
    changed_layers,
    find_machine,
    kept_bytes,
    make_method,
    sketching,
    takes_whole_gradient,
)
from llava_keeplora.plan.memory_estimate import F32, MemoryEstimate
from llava_keeplora.plan.sharding import read_sharding
from llava_keeplora.plan.workload import Work, read_work
from llava_keeplora.run_folder import Stage
from llava_keeplora.steps import optimiser_steps

#: Dotted key → value; `gpus` stands for the machine's.
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
MOST_GPUS = 8


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs.

    Args:
        stage: its name.
        device: peak bytes on each GPU; of the process on a CPU machine.
        host: peak bytes of a process beside its GPU; 0 on a CPU machine.
        fits: whether the device has them. Host memory beside GPUs is told and not judged: the machine may be
            another one.
        changes: settings with which this stage and all above it fit; None where none was found, or nothing is
            needed.
    """

    stage: str
    device: int
    host: int
    fits: bool
    changes: Changes | None = None


@dataclass(frozen=True)
class MethodPlan:
    """What one labelled method needs.

    Args:
        label: the method's label.
        stages: in their order.
        trainable: numbers that are trained in a task.
        stored: numbers of a task's delta.
        disk_task: bytes that a task leaves in the run folder.
        disk_base: bytes before the first task.
        steps: optimiser steps of every task.
        unsure: a sentence on a rank of which the base stage alone can say whether it fits; empty where it is
            sure to fit.
    """

    label: str
    stages: tuple[StagePlan, ...]
    trainable: int
    stored: int
    disk_task: int
    disk_base: int
    steps: tuple[int, ...]
    unsure: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Args:
        machine: what it was planned for.
        model: bytes of the model.
        tasks: names.
        examples: to learn, of every task.
        methods: what each needs.
        left_out: label → why a method is not planned.
        changes: settings with which everything fits; empty where it does as it is, None where none was found.
    """

    machine: Machine
    model: int
    tasks: tuple[str, ...]
    examples: tuple[int, ...]
    methods: tuple[MethodPlan, ...]
    left_out: Mapping[str, str]
    changes: Changes | None

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for method in self.methods for stage in method.stages)


def make_plan(config: RunConfig, gpus: int | None = None, gpu_memory_gb: float | None = None) -> Plan:
    """Peak memory of every stage, disk, parameters and steps of a run, without loading its weights.

    Methods that can't be rehearsed without data are left out and named.

    Args:
        config: the run.
        gpus: plan for so many GPUs; for the CPU of this machine when None.
        gpu_memory_gb: memory of each, in 10⁹ bytes; that of this machine's when None.

    Raises:
        ConfigError: for a configuration, a model or a machine that is none, or if no method is left.
        RecipeError: for a recipe or data that are wrong.
    """
    left_out = {
        label: why for label, method in config.methods.items() if (why := _unplanned(make_method(method)))
    }
    if not config.methods:
        raise ConfigError(
            "no method of the run learns anything, so there is nothing to plan", "name one under methods"
        )
    if len(left_out) == len(config.methods):
        label, why = next(iter(left_out.items()))
        raise ConfigError(f"'{label}' {why}", "run it without a plan")
    scenarios = _Scenarios(config, find_machine(gpus, gpu_memory_gb))
    asked, found, methods = scenarios.at({}), {}, []
    for label, rehearsal in asked.items():
        stages = []
        for stage in rehearsal.stages:
            fits, peak = scenarios.fits({}, label, stage), rehearsal.peak(stage)
            if not fits and found is not None:
                found = next(scenarios.fitting(found, label, stage), None)
            stages.append(StagePlan(stage, peak.device, peak.host, fits, None if fits else found))
        methods.append(_method_plan(label, rehearsal, tuple(stages), max(1, scenarios.machine.gpus)))
    work = scenarios.work
    return Plan(
        scenarios.machine,
        rehearsal.model_bytes,
        tuple(w.name for w in work),
        tuple(w.train for w in work),
        tuple(methods),
        left_out,
        found,
    )


def _unplanned(method: Method) -> str | None:
    """Return why a plan cannot estimate a method; None where it can."""
    if not method.uses_lora:
        return "does not train LoRA adapters, and a plan knows nothing else"
    if Stage.PREPARED in method.stage_cost and method.subspace_plan() is None:
        return "prepares its adapters from data, which a plan has none of"
    return None


def _method_plan(
    label: str, rehearsal: MemoryEstimate, stages: tuple[StagePlan, ...], world: int
) -> MethodPlan:
    config, work = rehearsal.config, rehearsal.work
    adapters = (
        sum(F32 * layer.rank * layer.module.in_features for layer in rehearsal.layers.values())
        if rehearsal.subspaces
        else 0
    )
    grown = (rehearsal.bases(len(work)) - rehearsal.bases(0)) // len(work)
    answers = sum(w.predictions for w in work)
    return MethodPlan(
        label,
        stages,
        rehearsal.trainable,
        rehearsal.delta_numbers,
        F32 * rehearsal.delta_numbers + adapters + grown + answers,
        rehearsal.bases(0) + answers,
        tuple(
            optimiser_steps(training, w.train, world)
            for w, training in zip(work, config.trainings(label), strict=True)
        ),
        _unsure_rank(rehearsal.layers.values()) if rehearsal.protects_weights else "",
    )


def _unsure_rank(layers: Iterable[Layer]) -> str:
    """Return a sentence on the first layer whose rank may exceed the directions that its weight leaves free.

    The k largest of n singular values have at least the share k/n of a weight's energy, so at most ⌈ε_w n⌉
    directions are protected, and a rank up to in − ⌈ε_w n⌉ fits whatever the weight. Where ε_w is `auto`, it
    is chosen so that the rank fits.
    """
    for layer in layers:
        out_dim, in_dim = layer.module.out_features, layer.module.in_features
        sure = in_dim - math.ceil(layer.energy_weight * min(out_dim, in_dim))
        if layer.rank > sure and "energy_weight" not in layer.auto:
            return (
                f"whether rank {layer.rank} fits layer {layer.name} is known only after the base stage, "
                f"which finds how many of its {in_dim} input directions energy_weight "
                f"{layer.energy_weight:g} protects; a rank up to {max(0, sure)} is sure to fit"
            )
    return ""


class _Scenarios:
    """The run under changed settings, rehearsed when asked for.

    Args:
        config: the run as it is.
        machine: where.
    """

    def __init__(self, config: RunConfig, machine: Machine):
        self.config, self.machine = config, machine
        self._made: dict[str, dict[str, MemoryEstimate]] = {}
        self.work: list[Work] = []
        self.at({})

    def at(self, changes: Changes) -> dict[str, MemoryEstimate]:
        """Label → rehearsal."""
        key = repr(sorted(changes.items()))
        if key not in self._made:
            self._made[key] = self._make(
                _changed(self.config, changes), changes.get("gpus", self.machine.gpus)
            )
        return self._made[key]

    def _make(self, config: RunConfig, gpus: int) -> dict[str, MemoryEstimate]:
        family = open_model(config.model, config.evaluation)
        changed = changed_layers(config, family)
        self.work = self.work or read_work(config, family, changed, max(1, gpus))
        text = getattr(family.model.config, "text_config", family.model.config)
        sharding = read_sharding(deepspeed_config(config), max(1, gpus), text.hidden_size)
        kept = 0 if sharding.partitions else kept_bytes(changed.values())
        planned = {
            label: method for label, method in config.methods.items() if not _unplanned(make_method(method))
        }
        return {
            label: MemoryEstimate(config, method, family, self.work, sharding, gpus == 0, kept)
            for label, method in planned.items()
        }

    def fits(self, changes: Changes, label: str, stage: str) -> bool:
        """Whether a stage does under these changes."""
        try:
            return self.at(changes)[label].peak(stage).device <= self.machine.room
        except ConfigError:
            # Statistics that are too small for a sketch, or settings that exclude each other.
            if not changes:
                raise
            return False

    def fitting(self, start: Changes, label: str, stage: str) -> Iterator[Changes]:
        """Changes on top of others with which a stage fits, the smallest first."""
        for heavy in self._heavy(start):
            base = {**start, **heavy}
            lights = [{}, *self._light(_changed(self.config, base), label, stage)]
            # The last one takes the least memory, and where even that is too much, the others needn't be
            # tried; but a budget of statistics may be too small for any sketch.
            if stage == "features" or self.fits({**base, **lights[-1]}, label, stage):
                yield from (
                    {**base, **light} for light in lights if self.fits({**base, **light}, label, stage)
                )

    def _light(self, config: RunConfig, label: str, stage: str) -> list[Changes]:
        """Changes to how a step is computed, from the smallest to the one that saves most."""
        batches = list(_smaller_batches(config.methods[label].training))
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
        """Nothing; half precision; a quantised base; weights and states in shards; more GPUs."""
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
    """Halves of a batch that keep the examples of a step."""
    size, steps = (
        int(training.get("per_device_train_batch_size", 8)),
        int(training.get("gradient_accumulation_steps", 1)),
    )
    halves = (size >> i for i in range(1, size.bit_length()))
    return ({BATCH: half, ACCUMULATION: size * steps // half} for half in halves if size * steps % half == 0)


def _same_examples(config: RunConfig, factor: int) -> Changes:
    """So many times the processes, and as many examples a step, where these can be divided."""
    training = next(iter(config.methods.values())).training
    size, steps = (
        int(training.get("per_device_train_batch_size", 8)),
        int(training.get("gradient_accumulation_steps", 1)),
    )
    if factor == 1 or size * steps % factor:
        return {}
    own = math.gcd(size, size * steps // factor)
    return {BATCH: own, ACCUMULATION: size * steps // factor // own}


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    """A run with some settings replaced, in every method."""
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
