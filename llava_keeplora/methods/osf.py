"""OSF: the weak directions of every weight are trained in full, the strong ones are frozen.

Source: Nayak et al., ICLR 2026, https://arxiv.org/abs/2504.07097 ("Sculpting Subspaces", OSFT), as the tuner
OSF of PEFT has it (https://github.com/huggingface/peft/pull/2685). The authors' code is
https://github.com/Red-Hat-AI-Innovation-Team/mini_trainer, which the function `osft` of
https://github.com/Red-Hat-AI-Innovation-Team/training_hub calls. Of the former `osft_utils.py` and `train.py`
were read (commit 01a3054), of the latter that function and its page (f793034), of the paper the abstract.

W = U_h S_h V_hᵀ + U_l S_l V_lᵀ is the singular value decomposition of a layer's current weight, with the
first k directions in the high part. U_l, S_l and V_l are trained, starting from the decomposition, with
gradients projected off U_h and V_h; the high part is frozen. Before each task the merged weight is decomposed
anew. The decomposition, the layers and the projection of gradients are PEFT's own.

Differences:

- From PEFT: it projects gradients, but AdamW divides each entry of a step by its own second moment, which
  leads out of the projected space, so that the high part is no longer protected exactly. With
  `project_steps`, U_l and V_l are projected after each step, so that U_hᵀ ΔW = 0 and ΔW V_h = 0, as the
  authors' code does; false is PEFT's form.
- From the paper: summaries of it say that a layer's share is mrr + I (trr − mrr), with I the mean cosine of
  its inputs and outputs. Neither PEFT, whose pull request says so, nor the authors' code as read does it, and
  neither is it done here.
- From the authors' code: its share is one for all layers as here, ⌊(1 − unfreeze_rank_ratio) · min(out, in)⌋
  directions; `preserved` is 1 − unfreeze_rank_ratio. It has no default for it and advises 0.25, that is 0.75
  here, where PEFT's 0.5 is the default. It does not change from task to task by itself; `preserved_step` adds
  to it, as PEFT's page advises. Gradients are clipped to norm 1 before they are projected there and after it
  here. Processes may shard the factors there (FSDP 2), which DeepSpeed cannot here with `project_steps`.
- Weight decay pulls U_l, S_l and V_l to 0, as in PEFT, and with them the weak part of the pre-trained weight.

A task's update is the change of whole weights, so `export --as merged` writes it and no adapter holds it.

Legend: in / out features of a layer, k frozen directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import ADAPTER, AdapterInit, Delta, Deltas, FullDelta, is_quantised
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Layer, Method, MethodInfo, TaskContext
from llava_keeplora.run_folder import CAPACITY


class Osf(Method):
    """OSF as `methods/osf.py` describes it."""

    info = MethodInfo(
        "osf",
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        "https://arxiv.org/abs/2504.07097",
        trained="the weak singular directions of every weight, with their values",
    )
    own_optimizer = True
    default_optimizer = ("project_steps", "false")
    supports_zero3 = False
    dense_updates = True

    @dataclass(frozen=True)
    class Options:
        """Settings of OSF; it does not use the parts' rank, alpha and thresholds.

        Args:
            preserved: share of a layer's singular directions that are frozen in the first task.
            preserved_step: increase of that share with every task.
            project_steps: whether U_l and V_l are projected after every step, as well as their gradients.
        """

        preserved: float = 0.5
        preserved_step: float = 0.0
        project_steps: bool = True

        def __post_init__(self) -> None:
            if not 0.0 < self.preserved < 1.0:
                raise MethodError(
                    f"preserved must be in (0, 1) (got {self.preserved})", "set it to 0.5, PEFT's default"
                )
            if not 0.0 <= self.preserved_step < 1.0:
                raise MethodError(
                    f"preserved_step must be in [0, 1) (got {self.preserved_step})",
                    "set it to 0 for the same share in all tasks",
                )

    def __init__(self, options: "Osf.Options"):
        super().__init__(options)
        # PEFT's form trains with the Trainer's own optimiser.
        self.own_optimizer = options.project_steps
        self._layers: dict[str, Any] = {}

    def check_tasks(self, count: int) -> None:
        """Check that every task has directions to train.

        Raises:
            MethodError: naming the first task in which the share that is frozen has reached 1.
        """
        first, step = self.options.preserved, self.options.preserved_step
        full = next((task for task in range(1, count + 1) if first + (task - 1) * step >= 1.0), None)
        if full:
            raise MethodError(
                f"preserved_step {step} freezes all directions in task {full} of {count} "
                f"(preserved is {first})",
                f"set it to less than {(1.0 - first) / (count - 1):.3g} in a new run; one that has begun has "
                f"room for {full - 1} tasks",
            )

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check that the weights can be decomposed and trained.

        Raises:
            MethodError: naming the layer.
        """
        for name, layer in layers.items():
            if is_quantised(layer.module):
                raise MethodError(
                    f"OSF trains parts of the weights themselves, but layer {name} is quantised",
                    "leave the base unquantised",
                )

    def frozen(self, layer: Layer, task: int) -> int:
        """Return k of a layer in a task, at least 1 and less than all."""
        directions = min(layer.module.in_features, layer.module.out_features)
        share = self.options.preserved + (task - 1) * self.options.preserved_step
        return max(1, min(int(directions * share), directions - 1))

    def planned_adapters(self, layers: Mapping[str, Layer]) -> dict[str, AdapterInit]:
        """Return no LoRA adapters; `training_context` puts PEFT's OSF layers on the model."""
        return {}

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return no LoRA adapters."""
        return {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Replace the layers by PEFT's, which decompose their weights; parts trained in full stay so."""
        # Imported here, because it takes seconds that commands which only read a run need not wait for.
        from peft import OSFConfig, get_peft_model
        from peft.tuners.osf import OSFLayer

        full = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ranks = {name: self.frozen(layer, ctx.index) for name, layer in ctx.layers.items()}
        config = OSFConfig(
            target_modules=r"(" + "|".join(name.replace(".", r"\.") for name in ranks) + r")",
            rank_pattern={f"^{name.replace('.', chr(92) + '.')}$": rank for name, rank in ranks.items()},
        )
        wrapper = get_peft_model(model, config)
        for parameter in full:
            parameter.requires_grad_(True)
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, OSFLayer)}
        try:
            yield
        finally:
            self._layers = {}
            wrapper.unload()

    def create_optimizer(self, ctx: TaskContext, default: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return AdamW that projects U_l and V_l after each step, with the Trainer's settings."""
        return ProjectedAdamW(default.param_groups, self._project) if self.own_optimizer else default

    def _project(self) -> None:
        for layer in self._layers.values():
            trained = layer.osf_svd_params[ADAPTER]
            U, V = trained["U_low"], trained["V_low"]
            U.copy_(_outside(U, layer._osf_U_high, layer._osf_U_low_init))
            V.copy_(_outside(V.T, layer._osf_V_high, layer._osf_V_low_init, transposed=True).T)

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return the change of every weight, U_l S_l V_lᵀ minus its start, and those of other modules."""
        changes: dict[str, Delta | FullDelta] = dict(deltas)
        for name, layer in self._layers.items():
            changes[name] = FullDelta({"weight": layer.get_delta_weight(ADAPTER).detach().float().cpu()})
        return changes

    def after_task(self, ctx: TaskContext) -> None:
        """Report how many directions the next task freezes."""
        ctx.report[CAPACITY] = {
            name: layer.capacity(self.frozen(layer, ctx.index + 1)).to_dict()
            for name, layer in ctx.layers.items()
        }


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW that calls a projection of the parameters after each step; the state is that of AdamW.

    Args:
        groups: parameter groups of AdamW.
        project: changes parameters in place.
    """

    def __init__(self, groups: list[dict[str, Any]], project: Callable[[], None]):
        super().__init__(groups)
        self._project = project

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and project."""
        loss = super().step(closure)
        self._project()
        return loss


def _outside(
    X: Tensor, high: Mapping[str, Tensor], low: Mapping[str, Tensor], transposed: bool = False
) -> Tensor:
    """Return X (d, n) without its part in the high directions.

    Args:
        X: the weak directions as they are now.
        high: the strong directions (d, k), where PEFT keeps them.
        low: the weak directions at the start (d, n), which span the complement where PEFT does not.
        transposed: whether `high` and `low` hold rows.
    """
    basis = high[ADAPTER] if ADAPTER in high else low[ADAPTER]
    basis = (basis.T if transposed else basis).to(X.dtype)
    inside = basis @ (basis.T @ X)
    return X - inside if ADAPTER in high else inside
