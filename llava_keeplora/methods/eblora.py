"""EBLoRA: an update with equal singular values, trained on the Stiefel manifold outside of earlier gradients.

Source: Gu et al., ICML 2026, https://arxiv.org/abs/2602.00722.

ΔW = (alpha / r) s U Vᵀ in every layer, with orthonormal U (out, r) and V (in, r), and one trained number s,
so that all singular values of the update are the same. V stays orthogonal to F, the principal subspace of
earlier tasks' gradients; nothing of W itself is protected. Before a task, U and V are the first singular
vectors of the gradient outside F, and s starts at −(α₀ + β₀ l / (L − 1)) in block l of L. U and V are trained
by AdamW with a polar retraction (see `stiefel.py`), s by AdamW. After the task, F is extended by the fewest
directions with which it holds the fraction ε_f of the energy of the task's gradient. Published for
LLaVA-1.5-7B, all seven linear layers, ε_f 0.99, gradients from 20 % of the data, cosine, warm-up 0.03: UCIT r
16, alpha 2 r, weight decay 0.1, α₀ = β₀ = 0, learning rate 2e-4 (last task 2e-5), batch 64, epochs 3, 1, 3,
3, 3, 1; MLLM-DCL r 32, alpha 5 r, no weight decay, α₀ 0.002, β₀ 0.006, learning rate 2e-5, batch 128, epochs
3, 3, 1, 2, 1.

Differences:

- From the paper: it was read through the authors' code alone. The code divides a step by √(r / 4096), that
  is, it makes it 16 times as long for r 16; whether √(d / 4096) with the width d of U or V is meant, as the
  purpose of the division suggests, is not established. `step_scale` is `rank`, as in the code, or `width`.
- From the official code (https://github.com/haodotgu/EBLoRA): it takes the gradients of all tasks from the
  untouched base, since the lines that load earlier adapters are commented out; here they come from the model
  before and after the task. It finds U and V by a randomised SVD without oversampling; here they are exact.
  Its singular vectors and F are in fp16, its adapters in bf16; here all are in fp32.
- As there, with s ≠ 0 at the start a task does not begin with the last task's model.
- DeepSpeed would split U and V over processes and is refused.
- `protect_weights`, `distillation` and `rejection`, KeepLoRA's W_p and what its presets `balanced` and
  `balanced-rejection` add, are no part of it; they are off by default.

Legend: in / out features of a layer, r rank, k columns of F.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import (
    ADAPTER,
    AdapterInit,
    Delta,
    Deltas,
    dense_weight,
    insert_between,
    lora_layers,
    read_adapters,
)
from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, SubspacePlan, TaskContext
from llava_keeplora.methods.gradient_init import first_step_directions, gradient_statistic
from llava_keeplora.methods.keeplora_plus_plus import block_factors
from llava_keeplora.methods.kept_features import KeptFeatures, check_kept_features
from llava_keeplora.methods.layers import in_layer
from llava_keeplora.methods.prototypes import check_rejection
from llava_keeplora.methods.rejection import VARIANT, RejectingMethod
from llava_keeplora.methods.stiefel import Frame, StiefelAdamW
from llava_keeplora.run_folder import Stage
from llava_keeplora.subspace import append_directions, feature_directions, principal_basis

#: The width, or rank, at which a step is as long as AdamW's; LLaVA-1.5-7B's width.
REFERENCE = 4096.0
STEP_SCALES = ("rank", "width")


class Scale(nn.Module):
    """A trained factor s on the adapter's inner features."""

    def __init__(self, start: float, like: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), start, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return s x."""
        return self.weight * x


class EbLora(KeptFeatures, RejectingMethod):
    """EBLoRA as `methods/eblora.py` describes it."""

    info = MethodInfo(
        "eblora",
        "Spectral Imbalance Causes Forgetting in Low-Rank Continual Adaptation",
        "https://arxiv.org/abs/2602.00722",
        kept="a basis for every layer, at most as wide as its input",
        trained="A and B with orthonormal rows and columns, a scale per layer",
        variants=VARIANT,
    )
    stage_cost = {Stage.PREPARED: 0.6, Stage.CONSOLIDATED: 0.6}
    own_optimizer = True
    counts_examples = True

    @dataclass(frozen=True)
    class Options:
        """Settings of EBLoRA; rank, alpha and ε_f are the parts'.

        Args:
            scale_start: α₀; s of the first block starts at −α₀.
            scale_slope: β₀; s of the last block starts at −(α₀ + β₀).
            step_scale: `rank`, as in the authors' code, or `width`: steps are divided by the root of that
                number of a matrix, relative to 4096.
            gradient_fraction: fraction of the task's data for gradients, evenly spaced.
            dropout: share of the adapter's input that is dropped while training.
            protect_weights: whether F holds W_p as well, KeepLoRA's principal directions of the weights.
            distillation: λ, the weight of keeping the task's image features near those of its start, on a
                model of two encoders (`kept_features.py`); 0 for none.
            rejection: the largest share of a task's training examples that may be taken for none of its kind;
                the untouched base answers an example as far away as these (`rejection.py`); 0 for no test.
        """

        scale_start: float = 0.0
        scale_slope: float = 0.0
        step_scale: str = "rank"
        gradient_fraction: float = 0.2
        dropout: float = 0.05
        protect_weights: bool = False
        distillation: float = 0.0
        rejection: float = 0.0

        def __post_init__(self) -> None:
            if self.step_scale not in STEP_SCALES:
                raise MethodError(
                    f"step_scale must be one of {', '.join(STEP_SCALES)} (got '{self.step_scale}')",
                    nearest(str(self.step_scale), STEP_SCALES),
                )
            if not 0.0 < self.gradient_fraction <= 1.0:
                raise MethodError(
                    f"gradient_fraction must be in (0, 1] (got {self.gradient_fraction})",
                    "set it to 1.0 for all of the data",
                )
            if not 0.0 <= self.dropout < 1.0:
                raise MethodError(
                    f"dropout must be in [0, 1) (got {self.dropout})", "set it to 0 for no dropout"
                )
            check_kept_features(self.distillation)
            check_rejection(self.rejection)

    def __init__(self, options: "EbLora.Options"):
        super().__init__(options)
        self.dropout = options.dropout
        self.keep_features(options.distillation)
        self.reject(options.rejection)
        self._model: nn.Module | None = None

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check that ε_f is a number, and ε_w where F holds W_p.

        Raises:
            MethodError: naming the part.
        """
        for layer in layers.values():
            if "energy_feature" in layer.auto:
                raise MethodError(
                    f"parts.{layer.part}.energy_feature is 'auto', a budget of KeepLoRA's, but EBLoRA "
                    "extends its subspace by gradients",
                    "set a number; the published one is 0.99",
                )
            if self.options.protect_weights and "energy_weight" in layer.auto:
                raise MethodError(
                    f"parts.{layer.part}.energy_weight is 'auto', which KeepLoRA alone chooses, but "
                    "EBLoRA protects the weights as well",
                    "set a number, or protect_weights to false",
                )

    def subspace_plan(self) -> SubspacePlan:
        """Return what the memory estimate needs to know; see `SubspacePlan`."""
        return SubspacePlan(
            protects_weights=self.options.protect_weights,
            protects_features=True,
            sketched=False,
            may_sketch=False,
            features_from_gradient=True,
            every_position=False,
            statistics=lambda groups, bases, budget, seed: {},
        )

    def planned_adapters(self, layers: Mapping[str, Layer]) -> dict[str, AdapterInit]:
        """Return adapters of the largest rank that a layer may get."""
        return {name: layer.adapter(layer.largest_rank, train_A=True) for name, layer in layers.items()}

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return adapters with A = Vᵀ and B = U of the residual gradient; layers without one are left out.

        Raises:
            MethodError: if no layer has a direction left.
        """
        bases = {name: self.basis(layer) for name, layer in ctx.layers.items()}
        free = {name: layer.module.in_features - bases[name].shape[1] for name, layer in ctx.layers.items()}
        ranks = {
            name: min(layer.rank, free[name], layer.module.out_features)
            for name, layer in ctx.layers.items()
            if free[name]
        }
        directions, left_out = first_step_directions(
            ctx,
            ranks,
            bases,
            self.options.gradient_fraction,
            False,
            lambda statistic, basis, rank: statistic.directions(rank, allow_fewer=True),
            in_layer,
        )
        left_out |= {name: "no room outside of earlier gradients" for name in bases if not free[name]}
        if not directions:
            energies = "energy_weight or energy_feature" if self.options.protect_weights else "energy_feature"
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'",
                f"lower {energies}, or adapt more layers",
            )
        ctx.report["left_out"] = left_out
        inits = {}
        for name, leading in directions.items():
            inits[name] = ctx.layers[name].adapter(
                leading.A.shape[1],
                leading.A.T.cpu().contiguous(),
                leading.right.cpu().contiguous(),
                train_A=True,
            )
        return inits

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put s between A and B of every layer."""
        starts = self._scale_starts(ctx.layers)
        with ExitStack() as stack:
            stack.enter_context(super().training_context(ctx, model))
            for name, layer in lora_layers(model).items():
                scale = Scale(starts[name], layer.lora_A[ADAPTER].weight)
                stack.enter_context(insert_between(layer, scale))
            self._model = model
            stack.callback(setattr, self, "_model", None)
            yield

    def _scale_starts(self, layers: Mapping[str, Layer]) -> dict[str, float]:
        """Return layer name → s at the task's start."""
        starts = dict.fromkeys(layers, -self.options.scale_start)
        for part in {layer.part for layer in layers.values()}:
            of_part = [name for name, layer in layers.items() if layer.part == part]
            for name, depth in block_factors(of_part, 0.0).items():
                starts[name] -= self.options.scale_slope * depth
        return starts

    def create_optimizer(self, ctx: TaskContext, default: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return AdamW with a retraction of U and V, with the settings of the Trainer's AdamW."""
        frames: dict[nn.Parameter, Frame] = {}
        for name, layer in lora_layers(self._model).items():
            A: Any = layer.lora_A[ADAPTER].weight
            B: Any = layer.lora_B[ADAPTER].weight
            rank = layer.r[ADAPTER]
            widths = (rank, rank) if self.options.step_scale == "rank" else (A.shape[1], B.shape[0])
            frames[A] = Frame(True, self.basis(ctx.layers[name]).to(A.device), widths[0])
            frames[B] = Frame(False, None, widths[1])
        return StiefelAdamW(default.param_groups, frames, REFERENCE)

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return (alpha / r) (s U) Vᵀ of every layer, with s, U and V as they are after training."""
        layers, ctx.report["scales"] = lora_layers(self._model), {}
        trained = {}
        for name, delta in read_adapters(self._model).items():
            scale = trained_values(layers[name].lora_A[ADAPTER].between.weight).cpu()
            ctx.report["scales"][name] = float(scale)
            trained[name] = Delta(delta.A.cpu(), scale * delta.B.cpu(), delta.scale)
        return trained

    def after_task(self, ctx: TaskContext) -> None:
        """Extend F by the task's gradient; on the base, F is empty, or W_p."""
        self._added, energies = {}, ctx.report.setdefault("gradient_energy", {})
        if not ctx.index and self.options.protect_weights:
            for name, layer in ctx.layers.items():
                weight = dense_weight(layer.module).detach()
                with in_layer(layer):
                    self._added[name] = principal_basis(weight, layer.energy_weight).basis.cpu()
            self.bases = dict(self._added)
        if ctx.index:
            gradients = {
                name: gradient_statistic(layer, self.basis(layer), None, ctx.seed)
                for name, layer in ctx.layers.items()
            }
            ctx.gradients(self.options.gradient_fraction, gradients)
            for name, gradient in gradients.items():
                layer, rows = ctx.layers[name], gradient.matrix.double()
                if not bool(rows.any()):
                    continue
                with in_layer(layer):
                    found = feature_directions(
                        rows.T @ rows, self.basis(layer).to(rows.device), layer.energy_feature
                    )
                grown = append_directions(self.basis(layer), found.new.cpu())
                self._added[name] = grown[:, grown.shape[1] - found.rank :].clone()
                self.bases[name] = grown
                energies[name] = {
                    "before": found.energy_before,
                    "after": found.energy_after,
                    "new": found.rank,
                }
        self.report_capacity(ctx)
        self.learn_prototypes(ctx)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return a task's columns of F (the base has none without W_p), and prototypes, in its state."""
        layers = ctx.layers if ctx.index or self.options.protect_weights else {}
        return {
            name: Holding((layer.module.in_features, None), (name,), required=False)
            for name, layer in layers.items()
        } | self.prototype_holding(ctx)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Rebuild every layer's F from the columns of all tasks."""
        self.bases = {}
        for state in self.load_prototypes(states):
            for name, new in state.items():
                self.append_columns(name, new)
