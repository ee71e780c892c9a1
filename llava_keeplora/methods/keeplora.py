"""KeepLoRA: adapters that move only outside the protected subspace (ICLR 2026, arXiv 2601.19659).

For each adapted layer the protected subspace M' joins the principal input directions of the pre-trained
weight (W_p) and the feature directions of earlier tasks (M_t). The first-step gradient of the new task,
projected off M', gives A by its top-r directions; A stays frozen and B alone trains.

A being frozen, training D = B − B₀ on the untouched weight is the same training as training B from B₀
on W' = W − s(A B₀)ᵀ, but for weight decay: decaying D pulls towards the model at the task's start,
decaying B towards W'. `form: delta` is the first and the default, `form: literal` the paper's second.

Where this differs:

- from the paper: the default `form`, under weight decay. Gradients and features that don't fit are held as
  sketches; how near A is to the best directions is estimated for every layer, and further passes over the
  data are made where it is short.
- from the official code (MaolinLuo/KeepLoRA), whose departures from the paper are the presets `released-clip`
  and `released-llava`: for CLIP, W_p from the weight's output side but projected on the input side, M_t from
      a running mean over batch slots, of the prompts over
  all 77 positions, one vector fewer by a strict energy rule; for LLaVA, that rule, M_t from the gradient on
  the merged model, gradients that count every example alike, and dropout. There the subspace isn't saved, and
  the schedule for CLIP is one-cycle, which the Trainer doesn't have. For LLaVA the gradient pass runs in fp16
  there, each gradient is stored in it and added to a running mean in it, example by example, so that entries
  below 6e-8 are lost and every addition rounds to eleven bits; here sums are in float32 (A alone is rounded
  to fp16, as there). Bases are kept in fp16 or bfloat16 there, in float32 here.

Legend: in / out features of a layer, r rank, k protected dimensions. A here is PEFT's (r, in).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.adapters import AdapterInit, Delta, dense_weight
from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.base import Holding, Layer, Method, MethodInfo, SubspacePlan, TaskContext
from llava_keeplora.methods.gradient_init import first_step_directions, gradient_statistic
from llava_keeplora.methods.keeplora_log import log_gradient_estimates, warn_unreached_energy
from llava_keeplora.methods.presets import RULES, least_statistics
from llava_keeplora.run_folder import CAPACITY, Capacity, Stage
from llava_keeplora.subspace import (
    FeatureDirections,
    RankError,
    ShapeError,
    SketchedDirections,
    SketchedFeatureDirections,
    SubspaceError,
    append_directions,
    empty_basis,
    residual,
)

CHOICES = {
    "preset": tuple(RULES),
    "form": ("delta", "literal"),
    "init": ("gradient", "random"),
    "gradient": ("sketch", "dense"),
}


class KeepLora(Method):
    """KeepLoRA as `methods/keeplora.py` describes it."""

    info = MethodInfo(
        "keeplora",
        "KeepLoRA: Continual Learning with Residual Gradient Adaptation",
        "https://arxiv.org/abs/2601.19659",
        kept="a basis for every layer, at most as wide as its input",
        trained="B",
    )

    stage_cost = {Stage.PREPARED: 3.0, Stage.CONSOLIDATED: 1.0}
    base_is_cacheable = True

    @dataclass(frozen=True)
    class Options:
        """Settings of KeepLoRA; rank, alpha, ε_w and ε_f are the parts'.

        Args:
            preset: `paper`, or `released-clip` and `released-llava` for what the authors' released code does.
            form: `delta` or `literal`, see docs/method.md; None takes the preset's.
            init: `gradient`, or `random` directions outside M' (an ablation).
            protect_weights: whether M' holds W_p (switched off: an ablation).
            protect_features: whether M' holds M_t (switched off: an ablation).
            gradient: how the first-step gradient is held: `sketch`, in a small multiple of r numbers per
                input and output, or `dense`, whole (the reference; small layers are dense anyhow); None takes
                the preset's.
            gradient_fraction: share of the task's data for the first-step gradient, evenly spaced.
            feature_fraction: share of it for the features that M_t is taken from, evenly spaced.
        """

        preset: str = "paper"
        form: str | None = None
        init: str = "gradient"
        protect_weights: bool = True
        protect_features: bool = True
        gradient: str | None = None
        gradient_fraction: float = 1.0
        feature_fraction: float = 1.0

        def __post_init__(self) -> None:
            for name, valid in CHOICES.items():
                value = getattr(self, name)
                if value not in valid and not (name in ("form", "gradient") and value is None):
                    raise MethodError(f"{name} is '{value}'", nearest(str(value), valid))
            for name in ("gradient_fraction", "feature_fraction"):
                if not 0.0 < getattr(self, name) <= 1.0:
                    raise MethodError(
                        f"{name} is {getattr(self, name)}, but a share of the data lies in (0, 1]",
                        "set it to 1.0",
                    )
            if self.feature_fraction < 1.0 and RULES[self.preset].evidence == "gradient":
                raise MethodError(
                    f"feature_fraction is {self.feature_fraction}, and the preset '{self.preset}' reads "
                    "gradients instead of features",
                    "set gradient_fraction",
                )
            if self.gradient == "sketch" and RULES[self.preset].gradient == "dense":
                raise MethodError(
                    f"the preset '{self.preset}' takes the gradient whole, as the released code does",
                    "remove `gradient: sketch`",
                )

    def __init__(self, options: "KeepLora.Options"):
        super().__init__(options)
        self.rules = RULES[options.preset]
        self.dropout, self.counts_examples, self.every_position = (
            self.rules.dropout,
            self.rules.counts_examples,
            self.rules.every_position,
        )
        self.form = options.form or self.rules.form
        self.one_process = self.rules.one_process and options.protect_features
        self.sketched = (options.gradient or self.rules.gradient) == "sketch"
        self.bases: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Refuse what a preset has no rule for, and a rank that no layer of this width has room for."""
        for layer in layers.values():
            width = layer.module.in_features
            # A principal subspace has a direction at least; how many more is known when the weights are
            # analysed.
            if self.options.protect_weights and layer.rank >= width:
                raise MethodError(
                    f"parts.{layer.part}.rank is {layer.rank}, and layer {layer.name} has {width} input "
                    "directions, of which one at least is protected",
                    f"set parts.{layer.part}.rank to {width - 1} or less, for instance 16",
                )
            if self.options.protect_weights and self.rules.square and layer.module.out_features != width:
                raise MethodError(
                    f"the preset '{self.options.preset}' takes a weight's directions for its input, which "
                    f"square layers alone allow, and {layer.name} "
                    f"is {layer.module.out_features} × {width}",
                    f"name square layers under parts.{layer.part}.targets, or use the preset 'paper'",
                )
            if layer.auto and self.options.preset != "paper":
                raise MethodError(
                    f"parts.{layer.part}.{layer.auto[0]} is 'auto', and the preset '{self.options.preset}' "
                    "follows released code, which has numbers",
                    "set a number, or use the preset 'paper'",
                )

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Of the paper's rules, which can sketch features: bytes that are sure to hold them in some form."""
        sketches = self.options.protect_features and self.options.preset == "paper"
        return least_statistics(list(layers.values())) if sketches else 0

    def subspace_plan(self) -> SubspacePlan:
        """Return what the plan of a run's memory needs to know; see `SubspacePlan`."""
        return SubspacePlan(
            protects_weights=self.options.protect_weights,
            protects_features=self.options.protect_features,
            sketched=self.sketched,
            may_sketch=self.options.gradient == "dense" and self.rules.gradient == "sketch",
            features_from_gradient=self.rules.evidence == "gradient",
            every_position=self.every_position,
            statistics=self.rules.statistics,
        )

    def after_task(self, ctx: TaskContext) -> None:
        """Grow M': by W_p on the base (`ctx.index` 0), by the task's feature directions after a task."""
        self._added = {}
        if ctx.index == 0:
            energies = self._energies(ctx)
            for layer in ctx.layers.values():
                self._added[layer.name] = self._weight_basis(layer, energies[layer.part])
        elif self.options.protect_features:
            self._added = self._feature_directions(ctx)
            ctx.report["layers_without_features"] = sorted(set(ctx.layers) - set(self._added))
        for name, new in self._added.items():
            self._grow(name, new)
        # What is kept is what the basis holds, after the appended columns were made orthogonal once more.
        self._added = {
            name: self.bases[name][:, -new.shape[1] or self.bases[name].shape[1] :]
            for name, new in self._added.items()
        }
        ctx.report[CAPACITY] = {
            name: layer.capacity(self.bases[name].shape[1]).to_dict() for name, layer in ctx.layers.items()
        }
        if ctx.index == 0:
            self._give_budgets(ctx)

    def _evidence(self, ctx: TaskContext) -> Mapping[str, Any]:
        """Layer name → what shows which directions the task uses.

        Its features' statistic, or its gradient.
        """
        if self.rules.evidence == "gradient":
            gradients = {
                name: gradient_statistic(layer, self.bases[name], None, ctx.seed)
                for name, layer in ctx.layers.items()
            }
            ctx.gradients(self.options.gradient_fraction, gradients)
            return {name: gradient for name, gradient in gradients.items() if bool(gradient.matrix.any())}

        def statistics(groups: list[list[str]]) -> dict[str, Any]:
            try:
                return self.rules.statistics(
                    [[ctx.layers[name] for name in names] for names in groups],
                    self.bases,
                    ctx.statistics_bytes,
                    ctx.seed,
                )
            except ShapeError as error:
                raise MethodError(
                    f"the features of task '{ctx.name}' don't fit into memory.statistics_gb ({error})",
                    "raise memory.statistics_gb",
                ) from error

        return ctx.features(statistics, self.options.feature_fraction)

    def _energies(self, ctx: TaskContext) -> dict[str, float]:
        """Part → ε_w, chosen where it is `auto`."""
        energies = {layer.part: layer.energy_weight for layer in ctx.layers.values()}
        auto = (
            {layer.part for layer in ctx.layers.values() if "energy_weight" in layer.auto}
            if self.options.protect_weights
            else set()
        )
        if auto:
            ctx.report["energy_weight"] = {part: ctx.choose(part) for part in energies if part in auto}
        return energies | {
            part: chosen["energy"] for part, chosen in ctx.report.get("energy_weight", {}).items()
        }

    def _give_budgets(self, ctx: TaskContext) -> None:
        """Where ε_f is `auto`, share the room of a layer out.

        After all tasks but the last, r directions must be left for that one.
        """
        rooms = {
            name: layer.module.in_features - self.bases[name].shape[1] - layer.rank
            for name, layer in ctx.layers.items()
            if "energy_feature" in layer.auto
        }
        if rooms and self.options.protect_features:
            ctx.report["feature_budget"] = {
                name: room // max(1, ctx.tasks - 1) for name, room in rooms.items()
            }

    def _limit(self, name: str, ctx: TaskContext) -> int | None:
        """The most directions that a task may add to a layer.

        Its budget, and what earlier tasks left of theirs.
        """
        if name not in ctx.base.get("feature_budget", {}):
            return None
        allowed = (
            Capacity.from_dict(ctx.base[CAPACITY][name]).protected
            + ctx.index * ctx.base["feature_budget"][name]
        )
        return max(0, allowed - self.bases[name].shape[1])

    def _weight_basis(self, layer: Layer, energy: float) -> Tensor:
        width = layer.module.in_features
        if not self.options.protect_weights:
            return empty_basis(width)
        with _in_layer(layer):
            basis = self.rules.weight_basis(dense_weight(layer.module).detach(), energy).basis
        # W' + ΔW needs room for r directions; better said now than after the first task.
        if layer.rank > width - basis.shape[1]:
            raise MethodError(
                f"layer {layer.name} has {width - basis.shape[1]} of {width} input directions left beside "
                "its principal subspace "
                f"(energy_weight {energy}), fewer than the rank {layer.rank}",
                f"lower parts.{layer.part}.rank or parts.{layer.part}.energy_weight",
            )
        return basis.cpu()

    def _feature_directions(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Layer name → the columns that its features add.

        A sketch that has too few of them gets a second pass over the data.
        """
        found: dict[str, FeatureDirections] = {}

        def read(evidence: Mapping[str, Any]) -> None:
            for name, statistic in evidence.items():
                layer = ctx.layers[name]
                with _in_layer(layer):
                    found[name] = self.rules.extend(
                        self.bases[name], statistic, layer.energy_feature, self._limit(name, ctx)
                    )

        evidence = dict(self._evidence(ctx))
        read(evidence)
        short = [name for name, one in found.items() if not getattr(one, "reached", True)]
        # What the first pass summed goes, one by one, as the second one's sketches come: these take the whole
        # budget again.
        evidence = {name: evidence[name] for name in short}
        again = {name: evidence.pop(name).refined() for name in short}
        if again:
            read(ctx.features(lambda groups: again, self.options.feature_fraction))
            warn_unreached_energy(
                ctx,
                {
                    name: found[name].energy_after
                    for name in again
                    if not getattr(found[name], "reached", True)
                },
            )
        report = ctx.report.setdefault("feature_energy", {})
        for name, one in found.items():
            report[name] = {"before": one.energy_before, "after": one.energy_after, "new": one.rank}
            if isinstance(one, SketchedFeatureDirections):
                report[name] |= {
                    "error": one.energy_error,
                    "missed": one.missed,
                    "fewest": one.fewest,
                    "reached": one.reached,
                    "passes": 1 + (name in again),
                }
        return {name: one.new.cpu() for name, one in found.items()}

    def _grow(self, name: str, new: Tensor) -> None:
        old = self.bases.get(name)
        self.bases[name] = new if old is None else append_directions(old, new)

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """A from the residual gradient; layers without a gradient or without room are left out and named."""
        rooms = {
            name: layer.module.in_features - self.bases[name].shape[1] for name, layer in ctx.layers.items()
        }
        ranks = {name: min(ctx.layers[name].rank, room) for name, room in rooms.items() if room}
        found, left_out = first_step_directions(
            ctx,
            ranks,
            self.bases,
            self.options.gradient_fraction,
            self.sketched,
            self.rules.directions,
            _in_layer,
        )
        left_out |= {
            name: "no room outside the protected subspace" for name, room in rooms.items() if not room
        }
        inits, numbers = {}, {}
        generator = torch.Generator().manual_seed(ctx.seed)
        for name, layer in ctx.layers.items():
            if name not in found:
                continue
            one = found[name]
            A, B = one.A.T.cpu(), (one.right * one.singular_values).cpu()
            if self.options.init == "random":
                A, B = _random_directions(A.shape[0], self.bases[name], generator), torch.zeros_like(B)
            # A task of few classes, or a nearly full layer, has fewer than r directions; the scale s stays.
            rank = A.shape[0]
            inits[name] = AdapterInit(
                rank, layer.alpha / layer.rank * rank, A, B if self.form == "literal" else None
            )
            numbers[name] = {"rank": rank, "residual_energy": one.residual_energy, "captured": one.captured}
            if isinstance(one, SketchedDirections):
                numbers[name] |= {
                    key: getattr(one, key)
                    for key in ("captured_error", "of_optimum", "at_least", "residual_bounds", "passes")
                }
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'",
                "lower energy_weight or energy_feature, or adapt more layers",
            )
        ctx.report.update(left_out=left_out, gradient=numbers)
        log_gradient_estimates(ctx.name, numbers)
        return inits

    def weight_offset(self, inits: Mapping[str, AdapterInit]) -> dict[str, Delta]:
        """The literal form trains on W' = W − s(A B₀)ᵀ."""
        return (
            {name: Delta(init.A, -init.B, init.scale) for name, init in inits.items()}
            if self.form == "literal"
            else {}
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The columns that the last `after_task` added to each layer's basis."""
        return dict(self._added)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Columns of M', of every layer on the base."""
        return {
            name: Holding((layer.module.in_features, None), (name,), required=ctx.index == 0)
            for name, layer in ctx.layers.items()
        }

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
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
            raise MethodError(
                f"in layer {self.layer.name}: {str(error).rstrip('.')}",
                "check the model's weights, the data and the thresholds",
            ) from error
