"""KeepLoRA: adapters that move only outside the protected subspace.

Source: Luo et al., ICLR 2026, https://arxiv.org/abs/2601.19659.

For each adapted layer, the protected subspace M' joins the principal input directions of the pre-trained
weight (W_p) and the feature directions of earlier tasks (M_t). The first-step gradient of the new task,
projected onto the complement of M', gives A as its top-r directions; A stays frozen and only B trains.

Because A is frozen, training D = B − B₀ on the untouched weight equals training B from B₀ on
W' = W − s(A B₀)ᵀ, except under weight decay: decay of D pulls towards the model at the task's start, decay of
B towards W'. `form: delta` is the former and the default, `form: literal` the latter and the paper's.

`interpolation: λ` merges λ ΔW instead of ΔW, as WiSE-FT does with a whole model's change (Wortsman et al.,
CVPR 2022, https://arxiv.org/abs/2109.01903): less is learned of a task, and disproportionately less is lost
of everything else. The features of M_t are those of the interpolated model. It is no part of the paper.

`update_bound: c` bounds a layer's update by what its weight does in the free directions, see
`update_bound.py`, `distillation: λ` keeps the image features of a model of two encoders near those of the
task's start, see `kept_features.py`, and `rejection: q` leaves to the untouched base what resembles no
learned task, see `rejection.py`. They are no part of the paper either.

Differences from the paper:

- The default `form` differs under weight decay.
- Gradients and features that don't fit into memory are sketched. How near A is to the best directions is
  estimated for every layer, and layers that fall short get further passes over the data.

Differences from the official code (https://github.com/MaolinLuo/KeepLoRA), whose own departures from the
paper are available as the presets `released-clip` and `released-llava`:

- For CLIP it takes W_p from the weight's output side but projects on the input side, and M_t from a running
  mean over batch slots, for the prompts over all 77 positions, with one vector fewer by a strict energy rule.
  For LLaVA it uses the same energy rule, takes M_t from the gradient on the merged model, weighs all examples
  equally in gradients, and uses dropout.
- It does not save the subspace, and its schedule for CLIP is one-cycle, which the Trainer does not have.
- For LLaVA its gradient pass runs in fp16: each gradient is stored in fp16 and added to a running mean in
  fp16, example by example, so that entries below 6e-8 are lost and every addition rounds to eleven bits. Here
  sums are in float32 (only A is rounded to fp16, as there).
- It stores bases in fp16 or bfloat16; here they are in float32.

Legend: in / out features of a layer, r rank, k protected dimensions. A here is PEFT's (r, in).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.adapters import AdapterInit, Delta, Deltas, dense_weight, project_deltas
from llava_keeplora.adapters.task_vectors import scale_deltas
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, SubspacePlan, TaskContext
from llava_keeplora.methods.feature_budget import BUDGET, budget_left, feature_budgets
from llava_keeplora.methods.gradient_init import (
    first_step_directions,
    gradient_statistic,
    random_directions,
)
from llava_keeplora.methods.keeplora_log import (
    feature_record,
    gradient_record,
    log_gradient_estimates,
    warn_unreached_energy,
)
from llava_keeplora.methods.keeplora_options import check_options, value_of
from llava_keeplora.methods.kept_features import KeptFeatures
from llava_keeplora.methods.layers import in_layer, unsure_layers
from llava_keeplora.methods.presets import RULES, least_statistics
from llava_keeplora.methods.rejection import VARIANT, RejectingMethod
from llava_keeplora.methods.shares import AUTO, Share, read_features
from llava_keeplora.methods.update_bound import bounded_deltas
from llava_keeplora.run_folder import Stage
from llava_keeplora.subspace import (
    FeatureDirections,
    ShapeError,
    append_directions,
    empty_basis,
    least_share,
)


class KeepLora(KeptFeatures, RejectingMethod):
    """KeepLoRA as `methods/keeplora.py` describes it."""

    info = MethodInfo(
        "keeplora",
        "KeepLoRA: Continual Learning with Residual Gradient Adaptation",
        "https://arxiv.org/abs/2601.19659",
        kept="a basis for every layer, at most as wide as its input",
        trained="B",
        variants=VARIANT,
    )

    stage_cost = {Stage.PREPARED: 3.0, Stage.CONSOLIDATED: 1.0}
    base_is_cacheable = True
    adopts = True

    @dataclass(frozen=True)
    class Options:
        """Settings of KeepLoRA; rank, alpha, ε_w and ε_f are the parts'.

        Args:
            preset: `paper`; `balanced`, which keeps image features (`distillation: 10`), and
                `balanced-rejection`, which also leaves to the untouched base what resembles no learned task
                (`rejection: 0.05`); `released-clip` and `released-llava`, what the authors' released code
                does.
            form: `delta` or `literal`, see docs/method.md; the preset's when None.
            init: `gradient`, or `random` directions outside M' (an ablation).
            protect_weights: whether M' holds W_p (False is an ablation).
            protect_features: whether M' holds M_t (False is an ablation).
            gradient: how the first-step gradient is summed: `sketch`, in a small multiple of r numbers per
                input and output, or `dense`, in full (small layers always are); the preset's when None.
            gradient_fraction: fraction of the task's data for the first-step gradient, evenly spaced; or
                `auto`, as much of them as it takes (all with a preset for released code).
            feature_fraction: the same for the features of M_t.
            feature_rule: how many directions M_t gains: `energy`, as many as ε_f (or its budget, if it is
                `auto`) asks for, or of these only those that `splitlora`'s rank rule takes.
            plasticity: α of the rule `splitlora`; more leaves more directions free.
            interpolation: λ, the share of a task's update that is merged; 1 is the whole of it. Parts that
                are trained in full keep the whole. The preset's when None.
            update_bound: c, the largest norm of a layer's update relative to that of its weight outside
                M'; of a longer update the share that reaches it is merged. None for no bound.
            distillation: λ, the weight of keeping the task's image features near those of its start, on a
                model of two encoders; 0 for none. The preset's when None.
            rejection: the largest share of a task's training examples that may be taken for none of its kind;
                the untouched base answers an example as far away as these; 0 for no test. The preset's when
                None.
        """

        preset: str = "paper"
        form: str | None = None
        init: str = "gradient"
        protect_weights: bool = True
        protect_features: bool = True
        gradient: str | None = None
        gradient_fraction: float | str = AUTO
        feature_fraction: float | str = AUTO
        feature_rule: str = "energy"
        plasticity: float = 20.0
        interpolation: float | None = None
        update_bound: float | None = None
        distillation: float | None = None
        rejection: float | None = None

        def __post_init__(self) -> None:
            check_options(self)

    def __init__(self, options: "KeepLora.Options"):
        super().__init__(options)
        self.rules = RULES[options.preset]
        self.dropout, self.counts_examples, self.every_position = (
            self.rules.dropout,
            self.rules.counts_examples,
            self.rules.every_position,
        )
        self.form = value_of(options, "form")
        self.interpolation = value_of(options, "interpolation")
        self.keep_features(value_of(options, "distillation"))
        self.reject(value_of(options, "rejection"))
        self.one_process = self.rules.one_process and options.protect_features
        self.gradient_fraction, self.feature_fraction = (
            1.0 if share == AUTO and self.rules.released else share
            for share in (options.gradient_fraction, options.feature_fraction)
        )
        self.sketched = value_of(options, "gradient") == "sketch"

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check that the preset has a rule for every layer, and that every layer has room for its rank.

        Raises:
            MethodError: naming the setting and the layer.
        """
        for layer in layers.values():
            width = layer.module.in_features
            # A principal subspace has at least one direction; the analysis of the weights tells how many.
            if self.options.protect_weights and layer.rank >= width:
                raise MethodError(
                    f"parts.{layer.part}.rank is {layer.rank}, but layer {layer.name} has {width} input "
                    "directions, of which at least one is protected",
                    f"set parts.{layer.part}.rank to {width - 1} or less, for instance 16",
                )
            if self.options.protect_weights and self.rules.square and layer.module.out_features != width:
                raise MethodError(
                    f"the preset '{self.options.preset}' uses output directions of a weight as input "
                    f"directions, which requires square layers, but {layer.name} "
                    f"is {layer.module.out_features} × {width}",
                    f"name square layers under parts.{layer.part}.targets, or use the preset 'paper'",
                )
            if layer.auto and self.rules.released:
                raise MethodError(
                    f"parts.{layer.part}.{layer.auto[0]} is 'auto', but the preset '{self.options.preset}' "
                    "follows released code, which has fixed numbers",
                    "set a number, or use the preset 'paper'",
                )

    def check_weights(self, layers: Mapping[str, Layer]) -> None:
        """Compute the principal subspaces that may leave fewer directions than the rank."""
        for layer in unsure_layers(layers.values()) if self.options.protect_weights else ():
            self._weight_basis(layer, layer.energy_weight)

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Return the bytes that suffice for the features in some form; 0 for presets that cannot sketch."""
        sketches = self.options.protect_features and not self.rules.released
        return least_statistics(list(layers.values())) if sketches else 0

    def subspace_plan(self) -> SubspacePlan:
        """Return what the memory estimate needs to know; see `SubspacePlan`."""
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
        """Extend M': by W_p on the base (`ctx.index` 0), by the task's feature directions after a task."""
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
        # The columns as they are in the basis, where appending has orthogonalised them once more.
        self._added = {
            name: self.bases[name][:, -new.shape[1] or self.bases[name].shape[1] :]
            for name, new in self._added.items()
        }
        self.report_capacity(ctx)
        budgets = {} if ctx.index else feature_budgets(ctx.layers, self.bases, ctx.tasks)
        if budgets and self.options.protect_features:
            ctx.report[BUDGET] = budgets
        self.learn_prototypes(ctx)

    def _evidence(
        self, ctx: TaskContext, extend: Callable[[str, Any], FeatureDirections]
    ) -> tuple[Mapping[str, Any], Share]:
        """Return the statistics that M_t is taken from, and what share of the data they have read.

        They are of the layers' features, or their gradients. `extend` gives a layer's new directions.

        Raises:
            MethodError: if the statistics exceed `memory.statistics_gb`.
        """
        if self.rules.evidence == "gradient":
            gradients = {
                name: gradient_statistic(layer, self.bases[name], None, ctx.seed)
                for name, layer in ctx.layers.items()
            }
            ctx.gradients(self.gradient_fraction, gradients)
            used = {name: gradient for name, gradient in gradients.items() if bool(gradient.matrix.any())}
            return used, 1.0

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

        return read_features(ctx, statistics, extend, self.bases, self.feature_fraction)

    def _energies(self, ctx: TaskContext) -> dict[str, float]:
        """Return part → ε_w, chosen from the data if it is `auto`."""
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

    def _least(self, layer: Layer, ctx: TaskContext) -> float:
        """Return the share of the features' energy that a direction must exceed to be added."""
        if self.options.feature_rule == "energy":
            return 0.0
        return least_share(ctx.index, self.options.plasticity, layer.module.in_features)

    def _weight_basis(self, layer: Layer, energy: float) -> Tensor:
        width = layer.module.in_features
        if not self.options.protect_weights:
            return empty_basis(width)
        with in_layer(layer):
            basis = self.rules.weight_basis(dense_weight(layer.module).detach(), energy).basis
        # The adapters need r free directions; refuse now rather than after the first task's training.
        if layer.rank > width - basis.shape[1]:
            raise MethodError(
                f"layer {layer.name} has {width - basis.shape[1]} of {width} input directions outside its "
                f"principal subspace (energy_weight {energy}), fewer than the rank {layer.rank}",
                f"lower parts.{layer.part}.rank or parts.{layer.part}.energy_weight",
            )
        return basis.cpu()

    def _feature_directions(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Return layer name → the columns that its features add to the basis.

        Layers whose sketch does not reach ε_f get a second pass over the data.
        """
        directions: dict[str, FeatureDirections] = {}

        def extend(name: str, statistic: Any) -> FeatureDirections:
            layer = ctx.layers[name]
            with in_layer(layer):
                return self.rules.extend(
                    self.bases[name],
                    statistic,
                    layer.energy_feature,
                    budget_left(ctx, name, self.bases[name].shape[1]),
                    self._least(layer, ctx),
                )

        evidence, share = self._evidence(ctx, extend)
        directions |= {name: extend(name, statistic) for name, statistic in evidence.items()}
        short = [name for name, of_layer in directions.items() if not getattr(of_layer, "reached", True)]
        # The second pass's sketches take the whole budget again, so the first's are released one by one.
        evidence = {name: evidence[name] for name in short}
        again = {name: evidence.pop(name).refined() for name in short}
        if again:
            second = ctx.features(lambda groups: again, share)
            directions |= {name: extend(name, statistic) for name, statistic in second.items()}
            warn_unreached_energy(
                ctx,
                {
                    name: directions[name].energy_after
                    for name in again
                    if not getattr(directions[name], "reached", True)
                },
                self.options.feature_rule,
            )
        report = ctx.report.setdefault("feature_energy", {})
        for name, of_layer in directions.items():
            report[name] = feature_record(of_layer, passes=1 + (name in again))
        return {name: of_layer.new.cpu() for name, of_layer in directions.items()}

    def _grow(self, name: str, new: Tensor) -> None:
        old = self.bases.get(name)
        self.bases[name] = new if old is None else append_directions(old, new)

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return adapters with A from the residual gradient; layers without gradient or room are left out.

        Raises:
            MethodError: if no layer has a direction left.
        """
        free = {
            name: layer.module.in_features - self.bases[name].shape[1] for name, layer in ctx.layers.items()
        }
        ranks = {name: min(ctx.layers[name].rank, count) for name, count in free.items() if count}
        directions, left_out = first_step_directions(
            ctx,
            ranks,
            self.bases,
            self.gradient_fraction,
            self.sketched,
            self.rules.directions,
            in_layer,
        )
        left_out |= {
            name: "no room outside the protected subspace" for name, count in free.items() if not count
        }
        inits, records = {}, {}
        generator = torch.Generator().manual_seed(ctx.seed)
        for name, layer in ctx.layers.items():
            if name not in directions:
                continue
            leading = directions[name]
            A, B = leading.A.T.cpu(), (leading.right * leading.singular_values).cpu()
            if self.options.init == "random":
                A, B = random_directions(A.shape[0], self.bases[name], generator), torch.zeros_like(B)
            # A task of few classes, or a nearly full layer, has fewer than r directions.
            inits[name] = layer.adapter(A.shape[0], A, B if self.form == "literal" else None)
            records[name] = gradient_record(leading)
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'",
                "lower energy_weight or energy_feature, or adapt more layers",
            )
        ctx.report.update(left_out=left_out, gradient=records)
        log_gradient_estimates(ctx.name, records)
        return inits

    def weight_offset(self, inits: Mapping[str, AdapterInit]) -> dict[str, Delta]:
        """Return −s(A B₀)ᵀ for the literal form, which trains on W' = W − s(A B₀)ᵀ."""
        return (
            {name: Delta(init.A, -init.B, init.scale) for name, init in inits.items()}
            if self.form == "literal"
            else {}
        )

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return λ ΔW of every adapted layer, no longer than the bound, between the task's start and its end.

        Modules that are trained in full are not among them, and keep the whole change.
        """
        bound = self.options.update_bound
        merged: Deltas = deltas if bound is None else bounded_deltas(ctx, deltas, self.bases, bound)
        return merged if self.interpolation == 1.0 else scale_deltas(merged, self.interpolation)

    def project(self, ctx: TaskContext, deltas: Deltas) -> Deltas:
        """Return ΔW (I − M' M'ᵀ) of every adapted layer; layers of which nothing is left are missing."""
        return project_deltas(deltas, self.bases)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the columns of M' in a task's state (the base has some of every layer), and prototypes."""
        return {
            name: Holding((layer.module.in_features, None), (name,), required=ctx.index == 0)
            for name, layer in ctx.layers.items()
        } | self.prototype_holding(ctx)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Rebuild every layer's basis from the columns of all tasks."""
        self.bases = {}
        for state in self.load_prototypes(states):
            for name, new in state.items():
                self.append_columns(name, new)
