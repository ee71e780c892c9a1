"""InfLoRA: adapters confined to the task's inputs outside of the subspace of earlier tasks' inputs.

Source: Liang and Li, CVPR 2024, https://arxiv.org/abs/2404.00228.

Before a task, with Φ = XᵀX of a layer's inputs over the task's data and M the protected subspace, A = U_rᵀ /
√3, U_r the first r left singular vectors of (I − M Mᵀ) Φ; A stays frozen, B trains from zero. After the task,
M is extended by the fewest directions with which it holds the fraction ε_t of the energy of Φ. Layers that
read the same tensor share Φ, A and M. Published for ViT-B/16: k and v, r 10, s 1, ε from 0.95 or 0.98 up to
1, Adam, learning rate 5e-4, batch 128.

Differences from the paper and the official code (https://github.com/liangyanshuo/InfLoRA):

- ε_t = ε_f + (t − 1) `energy_step`, at most 1, since the number of tasks T of a sequence that can be extended
  is not known; the published rise is `energy_step: (1 − ε_f) / T`.
- M stops where ε_t is reached; the official code stops one direction earlier after the first task (but takes
  at least one), and where ε_t is reached after every later task.
- DualGPM stores M or its orthogonal complement, whichever is smaller. Here each task's columns are written
  once and never again, which takes at most in² numbers per input for all tasks; so M itself is stored. Both
  forms protect the same subspace.
- Energies are those of Φ, that is σ⁴ of X, as in the official code; with σ², as for KeepLoRA's ε_f, the same
  fraction keeps more directions.
- Class prompts and answers replace a classification head per task; the loss is over the task's own classes,
  as there.

Legend: in features of a layer, r rank, k protected directions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, TaskContext
from llava_keeplora.methods.input_moments import AND, input_moments, least_moments
from llava_keeplora.methods.protecting import ProtectingMethod
from llava_keeplora.run_folder import Stage
from llava_keeplora.subspace import (
    append_directions,
    feature_directions,
    leading_directions,
)


class InfLora(ProtectingMethod):
    """InfLoRA as `methods/inflora.py` describes it."""

    info = MethodInfo(
        "inflora",
        "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
        "https://arxiv.org/abs/2404.00228",
        kept="a basis for every distinct input, at most as wide as its input",
        trained="B",
    )
    stage_cost = {Stage.PREPARED: 1.0, Stage.CONSOLIDATED: 1.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of InfLoRA; rank, alpha and ε_f are the parts'.

        Args:
            energy_step: increase of ε with every task, up to 1.
        """

        energy_step: float = 0.0

        def __post_init__(self) -> None:
            if not 0.0 <= self.energy_step < 1.0:
                raise MethodError(
                    f"energy_step must be in [0, 1) (got {self.energy_step})",
                    "set it to 0 for the same energy_feature in all tasks",
                )

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Return the bytes of Φ in fp32; see `least_moments`."""
        return least_moments(layers)

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return adapters with A from the task's inputs outside M; layers without such inputs are left out.

        Raises:
            MethodError: if no layer has a direction left.
        """
        inits, left_out = {}, dict.fromkeys(ctx.layers, "reads nothing")
        for names, moment in self._moments(ctx):
            rank = max(ctx.layers[name].rank for name in names)
            A = leading_directions(
                moment, self.basis(ctx.layers[names[0]]).to(moment.device), rank
            ).T.cpu() / math.sqrt(3)
            for name in names:
                layer, layer_rank = ctx.layers[name], min(len(A), ctx.layers[name].rank)
                left_out[name] = "no input outside the protected subspace"
                if layer_rank:
                    inits[name] = layer.adapter(layer_rank, A[:layer_rank].clone())
                    del left_out[name]
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'",
                "lower energy_feature or energy_step",
            )
        ctx.report["left_out"] = left_out
        return inits

    def after_task(self, ctx: TaskContext) -> None:
        """Extend M by the task's inputs; on the base, M is empty."""
        self._added, energies = {}, ctx.report.setdefault("feature_energy", {})
        for names, moment in self._moments(ctx) if ctx.index else ():
            layer = ctx.layers[names[0]]
            basis, energy = (
                self.basis(layer),
                min(1.0, layer.energy_feature + (ctx.index - 1) * self.options.energy_step),
            )
            # The eigenvalues of Φ² are the energies of Φ.
            directions = feature_directions(moment @ moment, basis.to(moment.device), energy)
            grown = append_directions(basis, directions.new.cpu())
            self._added[AND.join(names)] = grown[:, basis.shape[1] :].clone()
            self.bases |= dict.fromkeys(names, grown)
            energies |= dict.fromkeys(
                names,
                {
                    "before": directions.energy_before,
                    "after": directions.energy_after,
                    "new": directions.rank,
                },
            )
        self.report_capacity(ctx)

    def _moments(self, ctx: TaskContext) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Yield (names of layers that read the same tensor, its Φ (in, in) scaled to trace 1).

        Raises:
            MethodError: if Φ of all layers exceeds `memory.statistics_gb`.
        """
        for names, total in input_moments(ctx):
            moment = total.matrix.double()
            yield names, moment / moment.trace().clamp_min(torch.finfo(moment.dtype).tiny)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the columns of M in a task's state, one tensor for layers that read the same tensor."""
        groups = {
            key: key.split(AND) for key in names if ctx.index and ctx.layers.keys() >= set(key.split(AND))
        }
        return {
            key: Holding((ctx.layers[layers[0]].module.in_features, None), tuple(layers))
            for key, layers in groups.items()
        }

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Rebuild every layer's M from the columns of all tasks."""
        self.bases = {}
        for state in states:
            for key, new in state.items():
                for name in key.split(AND):
                    self.append_columns(name, new)
