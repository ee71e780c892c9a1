"""Sizes of what a method holds and keeps: subspaces and other state, updates, the model, the image cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from llava_keeplora.adapters import is_quantised
from llava_keeplora.methods import Layer, Method
from llava_keeplora.plan import linear_algebra
from llava_keeplora.plan.rehearsal import Rehearsal
from llava_keeplora.steps import Budget

F32 = 4


class Sizes(Rehearsal):
    """Sizes of one method's tensors; see `Rehearsal` for its arguments."""

    def columns(self, layer: Layer, tasks: int) -> int:
        """Return an estimate of the number of a layer's protected directions after `tasks` tasks.

        The weight counts as a random one (see `linear_algebra.random_rank`), and every task adds the share
        `linear_algebra.GROWTH` of the input width.
        """
        out_dim, in_dim = layer.module.out_features, layer.module.in_features
        weight = (
            linear_algebra.random_rank(out_dim, in_dim, layer.energy_weight)
            if self.subspaces.protects_weights
            else 0
        )
        features = round(linear_algebra.GROWTH * in_dim) * tasks if self.subspaces.protects_features else 0
        return min(weight + features, in_dim - 1)

    @property
    def protects_weights(self) -> bool:
        """Whether the method protects principal directions of the weights."""
        return self.subspaces is not None and self.subspaces.protects_weights

    def _answer_bytes(self, tasks: int) -> tuple[int, int]:
        """Return `Method.answer_bytes` after `tasks` tasks."""
        if not tasks:
            return 0, 0
        dense = {name: F32 * self._whole_numbers(name) for name in self.changed.modules}
        return self.method.answer_bytes(dense, F32 * self.delta_numbers, tasks)

    @property
    def _linear(self) -> list[nn.Linear]:
        return [module for module in self.family.model.modules() if isinstance(module, nn.Linear)]

    @cached_property
    def _dense_numbers(self) -> int:
        """Numbers of the model's parameters, with quantised weights expanded."""
        packed = sum(
            m.in_features * m.out_features - m.weight.numel() for m in self._linear if is_quantised(m)
        )
        return packed + sum(p.numel() for p in self.family.model.parameters())

    def bases(self, tasks: int) -> int:
        """Return the bytes of a method's state after `tasks` tasks; it is kept on the host."""
        return (
            sum(F32 * layer.module.in_features * self.columns(layer, tasks) for layer in self.layers.values())
            + self.subspaces.kept_bytes(self.layers, tasks)
            if self.subspaces
            else 0
        )

    def state_bytes(self, tasks: int) -> int:
        """Return the bytes of a state without subspaces after `tasks` tasks; it is kept on the host."""
        with torch.device("meta"):
            state = self.method.planned_state(self.layers, tasks) if tasks else None
        return sum(tensor.nbytes for tensor in (state or {}).values()) + sum(
            F32 * self._feature_width * (len(work.prompts["input_ids"]) if work.prompts else 1)
            for work in self.work[:tasks]
            if self.method.keeps_prototypes
        )

    @property
    def state_growth(self) -> int:
        """Most bytes that a task adds to it: the first, or the second, from which on a router is trained."""
        first = self.state_bytes(1)
        return max(first, self.state_bytes(min(2, len(self.work))) - first)

    @cached_property
    def _feature_width(self) -> int:
        """Width of the features of which prototypes are made."""

        def measure() -> int:
            with self._fake_model(), torch.no_grad():
                return self._question_features(1).shape[1]

        return self._once("feature width", measure)

    @cached_property
    def _start_features(self) -> int:
        """Bytes of the image features at a task's start that training looks up; see `KeptFeatures`."""
        if not self.method.keeps_features or self.crops:
            return 0
        trainings, world = self.config.trainings(self.label), self.sharding.world
        rows = (
            work.train
            for work, training in zip(self.work, trainings, strict=True)
            if Budget.of(training, work.train, world).repeats
        )
        return F32 * self._feature_width * max(rows, default=0)

    @cached_property
    def delta_numbers(self) -> int:
        """Numbers of one task's delta."""
        return sum(map(self._numbers, self.changed.modules))

    def _whole_numbers(self, name: str) -> int:
        module = self.changed.modules[name]
        if name in self.changed.full:
            return sum(p.numel() for p in module.parameters(recurse=False))
        return int(module.in_features * module.out_features)

    def _numbers(self, name: str) -> int:
        module = self.changed.modules[name]
        if name in self.changed.full or self.method.dense_updates:
            return self._whole_numbers(name)
        return self.layers[name].rank * int(module.in_features + module.out_features)

    @cached_property
    def stacked(self) -> set[str]:
        """Names of the layers whose deltas are stored separately instead of being summed into the weights."""
        return {
            name
            for name, module in self.changed.modules.items()
            if self.sharding.partitions or is_quantised(module)
        }

    @cached_property
    def _images(self) -> int:
        """Bytes of the image cache once every split has been seen."""
        left = capacity = int(self.config.data.cache_gb * 1e9)
        for work in [*self.work, *([self.general] if self.general else [])]:
            size = work.images * work.image_bytes
            left -= size if size <= left else 0
        return capacity - left


def second_training(method: Method, budgets: Sequence[Budget]) -> str:
    """Return a sentence on trainings that follow a method's tasks, which a plan leaves out; empty for none.

    Args:
        method: the method.
        budgets: what each task's training takes.
    """
    if not method.mixes:
        return ""
    further = [method.further_budget(index, budgets) for index in range(1, len(budgets) + 1)]
    seen = sum(budget.seen for budget in further if budget)
    if not seen:
        return ""
    return (
        "not counted: steps, memory and disk of the trainings that follow its tasks, "
        f"on {seen:,} examples in all"
    )
