"""Peak memory of every stage of one method, rehearsed without weights.

Passes, training steps and answers execute the run's own code on fake tensors (see `allocation_tracker.py` and
`rehearsal.py`). What depends on values cannot run that way and is computed in `linear_algebra.py`. Not
counted are the interpreter and the libraries themselves, the CUDA context, the allocator's fragmentation, and
the examples' texts.

Legend: in / out features of a layer, k columns of its basis, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used

from llava_keeplora.adapters import is_quantised
from llava_keeplora.capture import autocast, autocast_dtype, feature_pass, gradient_pass
from llava_keeplora.config import EXPORT_EXAMPLES
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Layer
from llava_keeplora.methods.gradient_init import gradient_statistic
from llava_keeplora.methods.presets import least_statistics
from llava_keeplora.models import repeated
from llava_keeplora.plan import linear_algebra
from llava_keeplora.plan.sizes import F32, Sizes
from llava_keeplora.start.check import enough_gb
from llava_keeplora.subspace import SecondMoment, ShapeError, SketchedMoment, sketch_width

STAGES = ("load", "basis", "gradient", "train", "features", "statistics", "evaluate", "export")
F16 = 2
#: Copies of all tensors while safetensors writes them: the bytes of each, then one string of all.
SERIALISED = 2


@dataclass(frozen=True)
class Peak:
    """Most memory that a stage needs at once, in bytes.

    Args:
        device: on each GPU; on a machine without GPUs, of the process.
        host: in the host memory of a process that has a GPU; 0 on a machine without GPUs.
    """

    device: int
    host: int = 0


@dataclass(frozen=True)
class _Step:
    """One optimiser step, measured.

    Args:
        bytes: peak on the device besides the model.
        numbers: how many numbers are trained.
        size: most bytes of one of them.
    """

    bytes: int
    numbers: int
    size: int


class MemoryEstimate(Sizes):
    """Peak memory of every stage of one method; see `Rehearsal` for its arguments."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that the method goes through, in their order."""
        absent = [] if self.method.gradient_statistics(self.layers) else ["statistics"]
        if not self.subspaces:
            absent += ["basis", "gradient", *(["features"] if not self.method.keeps_prototypes else [])]
        else:
            absent += (not self.subspaces.protects_weights) * ["basis"]
            absent += (not self.subspaces.first_gradient) * ["gradient"]
        return tuple(stage for stage in STAGES if stage not in absent)

    def peak(self, stage: str) -> Peak:
        """Return the peak of a stage; it is computed at the first call."""
        return getattr(self, f"_{stage}")

    def _sum(self, device: int, *, tasks: int, host: int = 0) -> Peak:
        """Return a stage's peak: what it takes itself, plus the model and what a run keeps to rebuild it.

        Args:
            device: bytes that the stage takes on the device.
            tasks: number of tasks whose subspaces, or other state, are kept.
            host: bytes that the stage takes on the host.
        """
        whole, shards = self.sharding.parameters(self.model_bytes, self.dtype.itemsize)
        # Stacked deltas are kept in fp32 and used in the model's precision.
        size = F32 + (self.dtype.itemsize if self.dtype != torch.float32 else 0)
        device += whole + size * len(self.work) * sum(map(self._numbers, self.stacked))
        kept = self.bases(tasks) + self.state_bytes(tasks) + self._answer_bytes(tasks)[0]
        host += shards + self.base_copies + kept + self._images
        return Peak(device + host) if self.cpu else Peak(device, host)

    # --- stages ----------------------------------------------------------------------------------

    @cached_property
    def _load(self) -> Peak:
        """Peak of loading, and of rebuilding the model from the deltas, layer by layer in fp32."""
        summed = [
            m.in_features * m.out_features
            for name, m in self.changed.modules.items()
            if name not in self.stacked
        ]
        largest, count = max(summed, default=0), len(self.work)
        # The sum in fp32 and one task's ΔW, and on a GPU the base's weight fetched from the host.
        device = largest * (2 * F32 + (0 if self.cpu else self.dtype.itemsize))
        peak = self._sum(device, tasks=count, host=count * F32 * self.delta_numbers)
        # The checkpoint's files are memory-mapped, and their pages count as the process's. Weights that keep
        # their dtype are these pages; others are new tensors.
        return (
            Peak(max(peak.device, self._reading))
            if self.cpu
            else Peak(peak.device, max(peak.host, self._reading))
        )

    @cached_property
    def _reading(self) -> int:
        """Bytes while the checkpoint is read."""
        stored = (
            transformers.AutoConfig.from_pretrained(self.family.path, revision=self.family.revision).dtype
            or torch.float32
        )
        made = stored != self.dtype or any(map(is_quantised, self._linear))
        return self.model_bytes + made * self._dense_numbers * stored.itemsize

    @cached_property
    def _basis(self) -> Peak:
        layers = self.layers.values()
        solving = max(self._basis_bytes(layer) for layer in layers)
        writing = SERIALISED * self.bases(0)
        return (
            self._sum(max(solving, writing), tasks=0)
            if self.cpu
            else self._sum(solving, tasks=0, host=writing)
        )

    def _basis_bytes(self, layer: Layer) -> int:
        """Return the bytes that computing a layer's basis from its weight takes."""
        out_dim, in_dim = layer.module.out_features, layer.module.in_features
        expanded = out_dim * in_dim * self.dtype.itemsize if layer.name in self.stacked else 0
        return expanded + linear_algebra.weight_basis(
            out_dim, in_dim, self.columns(layer, 0), self.dtype.itemsize
        )

    @cached_property
    def _gradient(self) -> Peak:
        return self._gradient_peak(self.subspaces.sketched)

    def _gradient_peak(self, sketched: bool) -> Peak:
        layers, tasks = self.layers.values(), max(0, len(self.work) - 1)
        key = self._pass_key("gradient", sketched, self._layers_key(tasks))
        passing, statistics = self._once(key, lambda: self._gradient_pass(sketched, tasks))
        shapes = [
            (
                layer.module.out_features,
                layer.module.in_features,
                sketch_width(layer.rank) if sketched else None,
            )
            for layer in layers
        ]
        solving = max(linear_algebra.gradient_directions(*shape) for shape in shapes)
        adapters = sum(
            F32 * layer.rank * (layer.module.in_features + layer.module.out_features) for layer in layers
        )
        return self._sum(max(passing, statistics + solving + adapters), tasks=tasks)

    def _gradient_pass(self, sketched: bool, tasks: int) -> tuple[int, int]:
        """Measure a gradient pass: its peak, and what its statistics take of it."""
        layers = self.layers
        with self._fake_model() as meter:
            bases = {
                name: torch.zeros(layer.module.in_features, self.columns(layer, tasks))
                for name, layer in layers.items()
            }
            before = meter.live
            statistics = {
                name: gradient_statistic(
                    layer, bases[name], sketch_width(layer.rank) if sketched else None, 0
                )
                for name, layer in layers.items()
            }
            # Where one pass falls short, further ones take no more than the first, see
            # `GradientSketch.forget_range`.
            statistics_bytes = meter.live - before
            meter.peak = meter.live
            task, batch = self._task(), self._batch()
            with autocast(self.training, "cpu"), task.recomputing(self.training):
                gradient_pass(task, self._modules(), [(batch, True)], 1, statistics)
            return meter.peak - before, statistics_bytes

    def _layers_key(self, tasks: int) -> Any:
        """Return what a pass's statistics, and bases after some tasks, depend on."""
        return [
            (name, layer.part, layer.rank, self.columns(layer, tasks)) for name, layer in self.layers.items()
        ]

    @cached_property
    def _features(self) -> Peak:
        passes = [self._directions] if self.subspaces else []
        passes += [self._prototypes] if self.method.keeps_prototypes else []
        return Peak(*(max(peak) for peak in zip(*((one.device, one.host) for one in passes))))

    @cached_property
    def _directions(self) -> Peak:
        """Peak of taking the directions that a task's features add to the subspaces."""
        if not self.subspaces.protects_features:
            return self._sum(0, tasks=0)
        if self.subspaces.features_from_gradient:
            return self._gradient_peak(sketched=False)
        tasks, kind = len(self.work) - 1, (self.subspaces.statistics, self.subspaces.every_position)
        key = self._pass_key("features", kind, self._layers_key(tasks))
        passing, statistics, rows, solving = self._once(key, lambda: self._feature_pass(tasks))
        if self.cpu:
            return self._sum(max(passing + rows, statistics + rows + solving), tasks=tasks)
        return self._sum(max(passing, statistics + solving), tasks=tasks, host=rows)

    def _feature_pass(self, tasks: int) -> tuple[int, int, int, int]:
        """Measure a feature pass: its peak without sampled rows, its statistics, these rows, and solving.

        Raises:
            ConfigError: if `memory.statistics_gb` is too small for its statistics.
        """
        layers = self.layers
        with self._fake_model() as meter:
            bases = {
                name: torch.zeros(layer.module.in_features, self.columns(layer, tasks))
                for name, layer in layers.items()
            }
            before, statistics_bytes = meter.live, 0
            collected: dict[str, Any] = {}

            def statistics(groups: list[list[str]]) -> Mapping[str, Any]:
                nonlocal statistics_bytes
                without = meter.live
                budget = int(self.config.memory.statistics_gb * 1e9)
                try:
                    collected.update(
                        self.subspaces.statistics(
                            [[layers[n] for n in names] for names in groups], bases, budget, 0
                        )
                    )
                except ShapeError as error:
                    enough = enough_gb(least_statistics(list(layers.values())))
                    raise ConfigError(
                        f"memory.statistics_gb is {self.config.memory.statistics_gb}, and "
                        f"{str(error).rstrip('.')}",
                        f"set it to {enough}, or more",
                    ) from error
                statistics_bytes = meter.live - without
                return collected

            meter.peak = meter.live
            with autocast(self.training, "cpu"):
                task = self._task().at_every_position() if self.subspaces.every_position else self._task()
                feature_pass(
                    task,
                    self._modules(),
                    {n: layer.part for n, layer in layers.items()},
                    [(self._batch(), True)],
                    statistics,
                )
            passing = meter.peak - before
            solving = max(
                self._extension_bytes(layers[name], statistic, tasks) for name, statistic in collected.items()
            )
            # Sampled rows are kept on the host; the rehearsal saw those of one batch.
            sketches = [
                statistic for statistic in collected.values() if isinstance(statistic, SketchedMoment)
            ]
            passing -= sum(sketch.sampled_bytes for sketch in sketches)
            precision = autocast_dtype(self.training) or self.dtype
            rows = sum(sketch.most_sampled_bytes(precision.itemsize) for sketch in sketches)
        return passing, statistics_bytes, rows, solving

    def _extension_bytes(self, layer: Layer, statistic: Any, tasks: int) -> int:
        """Return the bytes that computing a layer's new directions from its feature statistic takes."""
        in_dim = layer.module.in_features
        if isinstance(statistic, SecondMoment):
            return linear_algebra.feature_directions(
                in_dim, self.columns(layer, tasks), statistic.dtype == torch.float64
            )
        return (
            linear_algebra.sketched_feature_directions(in_dim, statistic.test.shape[1])
            if isinstance(statistic, SketchedMoment)
            else 0
        )

    @cached_property
    def _prototypes(self) -> Peak:
        """Peak of taking the features of a task's examples, and of these once more as one matrix."""
        rows = F32 * self._feature_width * max(work.train for work in self.work)
        size, tasks = min(self.config.evaluation.batch_size, self.largest.train), len(self.work) - 1

        def measure() -> int:
            with self._fake_model() as meter, torch.no_grad():
                self._question_features(size)
                return int(meter.peak - self.model_bytes)

        computing = self._once(("question features", size), measure)
        if self.cpu:
            return self._sum(max(computing + rows, 2 * rows), tasks=tasks)
        return self._sum(computing, tasks=tasks, host=2 * rows)

    @cached_property
    def _statistics(self) -> Peak:
        """Peak of a gradient pass of single examples after a task, and of writing what is kept of it."""
        with self._fake_model() as meter:
            before = meter.live
            statistics = self.method.gradient_statistics(self.layers)
            summed = meter.live - before
            meter.peak = meter.live
            task, batch = self._task(), repeated(self.largest.example, 1)
            with autocast(self.training, "cpu"), task.recomputing(self.training):
                gradient_pass(task, self._modules(), [(batch, True)], 1, statistics, per_example=True)
            passing = meter.peak - before
        added, tasks = self.state_bytes(1), len(self.work) - 1
        if self.cpu:
            return self._sum(max(passing, summed + added, added * (1 + SERIALISED)), tasks=tasks)
        return self._sum(passing, tasks=tasks, host=added * (1 + SERIALISED))

    @cached_property
    def _train(self) -> Peak:
        """Peak of one optimiser step with Adam's states, and with gradients where these are accumulated."""
        step = self._measured_step
        training, numbers, size = step.bytes, step.numbers, step.size
        if self.cpu and not self.method.plain_step:
            # What such a step holds of earlier tasks is counted with the host's memory.
            training -= self.state_bytes(len(self.work) - 1)
        host = 0
        if self.sharding.stage is not None:
            states, host = self.sharding.states(numbers)
            # The rehearsal kept the gradients unsplit.
            training += states + self.sharding.gradients(numbers, size) - numbers * size
        elif self.sharding.world > 1:
            # The processes' gradients are averaged in buckets, which are copies of them.
            training += numbers * size
        return self._sum(training, tasks=len(self.work) - 1, host=host + self._start_features)

    def _step_key(self) -> Any:
        """Return what a step depends on that differs between methods; for a loss of its own, itself."""
        if not self.method.plain_step:
            return "step", id(self)
        adapters = [(name, i.rank, i.train_A, i.train_B) for name, i in self._inits().items()]
        rest = [*self.changed.full], self.method.dropout, self._adam_moments(), self._accumulates
        return self._pass_key("step", adapters, *rest)

    @property
    def _accumulates(self) -> bool:
        """Whether a step has several batches, as one on several tasks' data has."""
        return int(self.training.get("gradient_accumulation_steps", 1)) > 1 or self.method.mixes

    @cached_property
    def _measured_step(self) -> _Step:
        return self._once(self._step_key(), self._step)

    def _step(self) -> _Step:
        """Measure one step of training on fake tensors."""
        split = self.sharding.stage is not None
        with self._adapters(), self._fake_model() as meter:
            parameters = self._trained_parameters()
            held = (
                []
                if split
                else [
                    torch.zeros(p.shape, dtype=p.dtype)
                    for p in parameters
                    for _ in range(self._adam_moments())
                ]
            )
            held += [
                p.detach().clone()
                for module in self.changed.full.values()
                for p in module.parameters(recurse=False)
            ]
            if self._accumulates and not split:
                for p in parameters:
                    p.grad = torch.zeros_like(p)
            meter.peak = meter.live
            task = self._task()
            with self._loss_of(task) as loss_of:
                with autocast(self.training, "cpu"):
                    loss = loss_of(self._batch())
                loss.backward()
            training = meter.peak - self.model_bytes
            task.eval()
            del held, loss
            return _Step(training, sum(p.numel() for p in parameters), max(p.itemsize for p in parameters))

    def _adam_moments(self) -> int:
        """Return how many tensors of a parameter's size the optimiser keeps; AdamW keeps two."""
        return {"sgd": 0, "adafactor": 0}.get(str(self.training.get("optim", "adamw")), 2)

    @cached_property
    def trainable(self) -> int:
        """How many numbers are trained in one task."""
        return self._measured_step.numbers

    @cached_property
    def _evaluate(self) -> Peak:
        work, size = self.largest, min(self.config.evaluation.batch_size, max(w.test for w in self.work))
        tasks = len(self.work)

        def measure() -> int:
            with self._fake_model() as meter, torch.no_grad():
                self.family.answer(work, size)
                return int(meter.peak - self.model_bytes)

        answering = self._once(("answer", size), measure)
        return self._sum(answering, tasks=tasks, host=self._answer_bytes(tasks)[1])

    @cached_property
    def _export(self) -> Peak:
        """Peak of the most expensive form of export, whose logits are compared in fp32 on a few examples.

        Whether the base is stored in 16 bits or in 32, both forms of the model are in host memory at some
        time: when it is read, when a merged one is written or converted to fp32, or when the process that
        loads it again converts it to bf16.
        """
        size = min(EXPORT_EXAMPLES, self.largest.test)

        def measure() -> int:
            with self._fake_model() as meter, torch.no_grad():
                self.family.workload_task(self.largest)(**repeated(self.largest.example, size))
                return int(meter.peak - self.model_bytes)

        computing = self._once(("export", size), measure) * F32 // self.dtype.itemsize
        numbers = self._dense_numbers
        host = max(
            self._reading, numbers * (F32 + F16), numbers * F32 + computing
        ) + F32 * self.delta_numbers * len(self.work)
        return Peak(host) if self.cpu else Peak(0, host)
