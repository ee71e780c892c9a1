"""KeepLoRA: adapters that move only outside the protected subspace (ICLR 2026, arXiv 2601.19659).

For each adapted layer the protected subspace M' joins the principal input directions of the pre-trained
weight (W_p) and the feature directions of earlier tasks (M_t). The first-step gradient of the new task,
projected off M', gives A by its top-r directions; A stays frozen and B alone trains.

A being frozen, training D = B − B₀ on the untouched weight is the same training as training B from B₀
on W' = W − s(A B₀)ᵀ, but for weight decay: decaying D pulls towards the model at the task's start,
decaying B towards W'. `form: delta` is the first and the default, `form: literal` the paper's second.

Legend: in / out features of a layer, r rank, k protected dimensions. A here is PEFT's (r, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.base import Layer, Method, Record, TaskContext
from llava_keeplora.methods.keeplora_rules import RULES
from llava_keeplora.subspace import RankError, SubspaceError, append_directions, empty_basis, residual

CHOICES = {"preset": tuple(RULES), "form": ("delta", "literal"), "init": ("gradient", "random")}


class KeepLora(Method):
    """KeepLoRA as `methods/keeplora.py` describes it."""

    record = Record(
        "keeplora", "KeepLoRA: Continual Learning with Residual Gradient Adaptation", "https://arxiv.org/abs/2601.19659"
    )

    passes = {"PREPARED": 3.0, "CONSOLIDATED": 1.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of KeepLoRA; rank, alpha, ε_w and ε_f are the parts'.

        Args:
            preset: `paper`, or `released-clip` and `released-llava` for what the authors' released code does.
            form: `delta` or `literal`, see the module's docstring; None takes the preset's.
            init: `gradient`, or `random` directions outside M' (an ablation).
            protect_weights: whether M' holds W_p (switched off: an ablation).
            protect_features: whether M' holds M_t (switched off: an ablation).
            gradient_fraction: share of the task's data for the first-step gradient, evenly spaced.
        """

        preset: str = "paper"
        form: str | None = None
        init: str = "gradient"
        protect_weights: bool = True
        protect_features: bool = True
        gradient_fraction: float = 1.0

        def __post_init__(self) -> None:
            for name, valid in CHOICES.items():
                value = getattr(self, name)
                if value not in valid and not (name == "form" and value is None):
                    raise MethodError(f"{name} is '{value}'", nearest(str(value), valid))
            if not 0.0 < self.gradient_fraction <= 1.0:
                raise MethodError(f"gradient_fraction is {self.gradient_fraction}, but a share of the data lies in (0, 1]", "set it to 1.0")

    def __init__(self, options: "KeepLora.Options"):
        super().__init__(options)
        self.rules = RULES[options.preset]
        self.dropout = self.rules.dropout
        self.form = options.form or self.rules.form
        self.bases: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}

    def consolidate(self, ctx: TaskContext) -> None:
        """Grow M': by W_p on the base (`ctx.index` 0), by the task's feature directions after a task."""
        self._added = {}
        if ctx.index == 0:
            for layer in ctx.layers.values():
                self._added[layer.name] = self._weight_basis(layer, ctx)
        elif self.options.protect_features:
            evidence = self._evidence(ctx)
            for name, found in evidence.items():
                self._added[name] = self._feature_directions(ctx.layers[name], found, ctx)
            ctx.report["layers_without_features"] = sorted(set(ctx.layers) - set(evidence))
        for name, new in self._added.items():
            self._grow(name, new)
        # What is kept is what the basis holds, after the appended columns were made orthogonal once more.
        self._added = {name: self.bases[name][:, -new.shape[1] or self.bases[name].shape[1] :] for name, new in self._added.items()}
        ctx.report["capacity"] = {
            name: {"in": layer.module.in_features, "k": self.bases[name].shape[1], "part": layer.part} for name, layer in ctx.layers.items()
        }

    def _evidence(self, ctx: TaskContext) -> dict[str, Any]:
        """Layer name → what shows which directions the task uses: its features' statistic, or its gradient."""
        if self.rules.evidence == "gradient":
            gradients = ctx.gradients(self.options.gradient_fraction)
            return {name: gradient.cpu() for name, gradient in gradients.items() if bool(gradient.any())}
        statistics, leaders = ctx.features(self.rules.statistic)
        return {name: statistics[leaders[name]] for name in ctx.layers if name in leaders}

    def _weight_basis(self, layer: Layer, ctx: TaskContext) -> Tensor:
        width = layer.module.in_features
        if not self.options.protect_weights:
            return empty_basis(width)
        with _in_layer(layer):
            basis = self.rules.weight_basis(layer.module.weight.detach(), layer.energy_weight).basis
        # W' + ΔW needs room for r directions; better said now than after the first task.
        if layer.rank > width - basis.shape[1]:
            raise MethodError(
                f"layer {layer.name} has {width - basis.shape[1]} of {width} input directions left beside its principal subspace "
                f"(energy_weight {layer.energy_weight}), fewer than the rank {layer.rank}",
                f"lower parts.{layer.part}.rank or parts.{layer.part}.energy_weight",
            )
        return basis.cpu()

    def _feature_directions(self, layer: Layer, statistic, ctx: TaskContext) -> Tensor:
        with _in_layer(layer):
            found = self.rules.extend(self.bases[layer.name], statistic, layer.energy_feature)
        ctx.report.setdefault("feature_energy", {})[layer.name] = {"before": found.energy_before, "after": found.energy_after, "new": found.rank}
        return found.new.cpu()

    def _grow(self, name: str, new: Tensor) -> None:
        old = self.bases.get(name)
        self.bases[name] = new if old is None else append_directions(old, new)

    def prepare(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """A from the residual gradient; layers without a gradient or without room are left out and named."""
        gradients = ctx.gradients(self.options.gradient_fraction)
        inits, left_out, numbers = {}, {}, {}
        generator = torch.Generator().manual_seed(ctx.seed)
        for name, layer in ctx.layers.items():
            basis = self.bases[name]
            gradient = gradients.get(name)
            if gradient is None or not bool(gradient.any()):
                left_out[name] = "no gradient"
                continue
            room = layer.module.in_features - basis.shape[1]
            if room == 0:
                left_out[name] = "no room outside the protected subspace"
                continue
            with _in_layer(layer):
                try:
                    found = self.rules.directions(gradient.cpu(), basis, min(layer.rank, room))
                except RankError:
                    left_out[name] = "no gradient outside the protected subspace"
                    continue
            A, B = found.A.T, found.right * found.singular_values
            if self.options.init == "random":
                A, B = _random_directions(A.shape[0], basis, generator), torch.zeros_like(B)
            # A task of few classes, or a nearly full layer, has fewer than r directions; the scale s stays.
            rank = A.shape[0]
            inits[name] = AdapterInit(rank, layer.alpha / layer.rank * rank, A, B if self.form == "literal" else None)
            numbers[name] = {"rank": rank, "residual_energy": found.residual_energy, "captured": found.captured}
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'", "lower energy_weight or energy_feature, or adapt more layers"
            )
        ctx.report.update(left_out=left_out, gradient=numbers)
        return inits

    def base_offset(self, inits: Mapping[str, AdapterInit]) -> bool:
        """The literal form trains on W' = W − s(A B₀)ᵀ."""
        return self.form == "literal"

    def state(self) -> dict[str, Tensor]:
        """The columns that the last `consolidate` added to each layer's basis."""
        return dict(self._added)

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """Rebuild every basis from its columns, task by task."""
        self.bases = {}
        for state in states:
            for name, new in state.items():
                self.bases[name] = torch.cat([self.bases[name], new], dim=1) if name in self.bases else new

    def capacity(self) -> dict[str, int]:
        """Layer name → k."""
        return {name: basis.shape[1] for name, basis in self.bases.items()}


def _random_directions(rank: int, basis: Tensor, generator: torch.Generator) -> Tensor:
    """`rank` random orthonormal directions (rank, in) outside the basis."""
    width = basis.shape[0]
    draw = residual(torch.randn(rank, width, generator=generator, dtype=torch.float64), basis.double())
    return torch.linalg.qr(residual(draw, basis.double()).T).Q.T.float()


class _in_layer:
    """Name the layer in which the mathematics refused its input."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, SubspaceError) and not isinstance(error, RankError):
            raise MethodError(f"in layer {self.layer.name}: {str(error).rstrip('.')}", "check the model's weights, the data and the thresholds") from error
