"""SplitLoRA: adapters that read random directions outside of the ones that earlier tasks' inputs need.

Source: Qiu et al., ICLR 2026, https://arxiv.org/abs/2505.22370.

Φ is the mean over all finished tasks of the mean of x xᵀ over a layer's inputs, S its eigenvalues, d its
width. After t tasks the first n eigenvectors are protected, where n minimises
t (1 − Σ_{i≤n} S_i / ΣS) − α (d − n) / d: a direction is protected if its share of the energy is above
α / (t d), so more are with every task. In the next task, A is a random combination of the others, with the
norm √(r / 3) / t' where t' = t + 1 is the task's number; A stays frozen, B trains from zero. In the first
task A is Kaiming-uniform, whose expected squared norm is r / 3. Published for ViT-B/16: k and v, r 10, s 1, α
20, AdamW, learning rate 1e-3, weight decay 5e-5, 10 epochs, batch 256.

Differences:

- From the paper: it was read through the authors' README and code alone.
- From the official code (https://github.com/iLearn-Lab/ICLR26-SplitLoRA): it protects at least two
  directions, here at least one. It scales A to the norm of the Kaiming-uniform draw that it replaces, divided
  by t'; here to that draw's root mean square norm. Its pass over the inputs sees augmented images, ten times
  the set; here the task's data once. There every input weighs the same in Φ, so that a larger task weighs
  more; here every task weighs the same, as a class prompt is read with every batch. k and v have a Φ each
  there, with the same values; layers that read the same tensor share it here, and each has its own random A
  in both.
- The cross-entropy of the task's classes by prompts or answers replaces a classification head with a
  temperature and a learning rate of its own.
- α is the option `plasticity`; the parts' alpha is the scale's, as in every method (`alpha` = rank for s 1).

Legend: in features of a layer, r rank, n protected directions, t finished tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, SubspacePlan, TaskContext
from llava_keeplora.methods.input_moments import AND, input_moments, least_moments, second_moments
from llava_keeplora.methods.protecting import ProtectingMethod
from llava_keeplora.run_folder import Stage
from llava_keeplora.subspace import least_share, residual

MOMENT, BASIS = "moment", "basis"


class SplitLora(ProtectingMethod):
    """SplitLoRA as `methods/splitlora.py` describes it."""

    info = MethodInfo(
        "splitlora",
        "SplitLoRA: Balancing Stability and Plasticity in Continual Learning Through Gradient Space "
        "Splitting",
        "https://arxiv.org/abs/2505.22370",
        kept="a second moment and a basis for every distinct input",
        trained="B",
    )
    stage_cost = {Stage.CONSOLIDATED: 1.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of SplitLoRA; rank and alpha are the parts'.

        Args:
            plasticity: α, the worth of a free direction against the energy of earlier tasks' inputs.
        """

        plasticity: float = 20.0

        def __post_init__(self) -> None:
            if not self.plasticity >= 0.0:
                raise MethodError(
                    f"plasticity must not be negative (got {self.plasticity})", "set it to 20, as published"
                )

    def __init__(self, options: "SplitLora.Options"):
        super().__init__(options)
        self._moments: dict[str, Tensor] = {}

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Return the bytes of Φ in fp32; see `least_moments`."""
        return least_moments(layers)

    def subspace_plan(self) -> SubspacePlan:
        """Return what the memory estimate needs to know; see `SubspacePlan`."""

        def statistics(
            groups: list[list[Layer]], bases: Mapping[str, Tensor], budget: int, seed: int
        ) -> Mapping[str, Any]:
            return second_moments(groups, budget)

        return SubspacePlan(
            protects_weights=False,
            protects_features=True,
            sketched=False,
            may_sketch=False,
            features_from_gradient=False,
            every_position=False,
            statistics=statistics,
            first_gradient=False,
            kept_bytes=lambda layers, tasks: tasks * least_moments(layers),
        )

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return adapters with a random A outside the protected directions; full layers are left out.

        Raises:
            MethodError: if no layer has a direction left.
        """
        generator = torch.Generator().manual_seed(ctx.seed)
        inits, left_out = {}, {}
        # Sorted, so that the order of a configuration's parts does not change what is drawn.
        for name, layer in sorted(ctx.layers.items()):
            width = layer.module.in_features
            basis = self.basis(layer)
            rank = min(layer.rank, width - basis.shape[1])
            if not rank:
                left_out[name] = "no room outside the protected directions"
                continue
            A = random_rows(rank, basis, ctx.index, generator)
            inits[name] = layer.adapter(rank, A)
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'", "raise plasticity"
            )
        ctx.report["left_out"] = left_out
        return inits

    def after_task(self, ctx: TaskContext) -> None:
        """Add the task's inputs to Φ, and choose the protected directions anew; none on the base."""
        self._added, energies = {}, ctx.report.setdefault("feature_energy", {})
        for names, moment in input_moments(ctx) if ctx.index else ():
            key = AND.join(names)
            # In fp32, as it is stored: a resumed run must choose the same directions.
            new = moment.mean.float().cpu()
            total = self._moments.get(key, torch.zeros_like(new)) + new
            basis, share = protected_directions(total, ctx.index, self.options.plasticity)
            self._moments[key] = total
            self._added |= {f"{MOMENT}.{key}": new, f"{BASIS}.{key}": basis}
            self.bases |= dict.fromkeys(names, basis)
            energies |= dict.fromkeys(names, {"after": share, "protected": basis.shape[1]})
        self.report_capacity(ctx)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the tensors of a task's state: a moment and a basis for every distinct input."""
        holdings = {}
        for name in names if ctx.index else ():
            kind, _, key = name.partition(".")
            layers = key.split(AND)
            if kind in (MOMENT, BASIS) and ctx.layers.keys() >= set(layers):
                width = ctx.layers[layers[0]].module.in_features
                holdings[name] = Holding((width, width if kind == MOMENT else None))
        return holdings

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Sum up the moments of all tasks, in order, and take the directions chosen last."""
        self.bases, self._moments = {}, {}
        for state in states:
            for name, value in state.items():
                kind, _, key = name.partition(".")
                if kind == MOMENT:
                    self._moments[key] = self._moments.get(key, torch.zeros_like(value)) + value
                else:
                    self.bases |= dict.fromkeys(key.split(AND), value)


def protected_directions(moment: Tensor, tasks: int, plasticity: float) -> tuple[Tensor, float]:
    """Return the eigenvectors that SplitLoRA protects, and their share of the energy.

    Args:
        moment: Φ, (in, in), of any scale.
        tasks: t, the number of finished tasks.
        plasticity: α.

    Returns:
        ((in, n) float32 with orthonormal columns, n at least 1; their share in [0, 1]).
    """
    values, vectors = torch.linalg.eigh(moment.double())
    shares = values.flip(0).clamp_min(0.0) / values.clamp_min(0.0).sum().clamp_min(1e-300)
    count = max(1, int((shares > least_share(tasks, plasticity, len(shares))).sum()))
    return vectors.flip(1)[:, :count].float().contiguous(), float(shares[:count].sum())


def random_rows(rank: int, basis: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """Return A (r, in): Kaiming-uniform in the first task, later a random combination outside a basis.

    Args:
        rank: r.
        basis: the protected directions, (in, n).
        task: the task's number, from 1.
        generator: the source of the numbers.
    """
    width = basis.shape[0]
    if task == 1:
        return (2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width)
    # Normal rows projected off the basis have the distribution of normal combinations of its complement.
    draw = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    rows = residual(residual(draw, basis.double()), basis.double())
    return (rows / rows.norm() * math.sqrt(rank / 3) / task).float()
