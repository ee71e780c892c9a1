"""PEFT LoRA adapters on a named set of linear layers, for the training of one task.

Legend: in / out features of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_keeplora.adapters.deltas import Delta
from llava_keeplora.deepspeed_zero import trained_values

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
#: Name of the module that `insert_between` puts into A.
BETWEEN = "between"


@dataclass(frozen=True)
class AdapterInit:
    """Initial values of one layer's adapter.

    Args:
        rank: r.
        alpha: the scale s is alpha / rank.
        A: (r, in), or None for PEFT's Kaiming-uniform initialisation.
        B: (out, r), or None for zeros.
        train_A: whether A is trained.
        train_B: whether B is trained; a method that freezes both trains a module in between, see
            `insert_between`.
    """

    rank: int
    alpha: float
    A: Tensor | None = None
    B: Tensor | None = None
    train_A: bool = False
    train_B: bool = True

    @property
    def scale(self) -> float:
        """The scale s = alpha / rank."""
        return self.alpha / self.rank


def attach(
    model: nn.Module, inits: Mapping[str, AdapterInit], dropout: float = 0.0, master_copies: bool = False
) -> PeftModel | None:
    """Put a LoRA adapter on each named linear layer, and freeze everything else.

    Args:
        model: the model; its linear layers become `peft` LoRA layers in place.
        inits: full layer name → initial values.
        dropout: dropout on the adapter's input while training.
        master_copies: whether the optimiser keeps fp32 copies of the trained parameters, as DeepSpeed's does;
            adapters then have the base's dtype, since ZeRO-3 needs a single one, and fp32 otherwise.

    Returns:
        the PEFT wrapper, to be passed to `detach` afterwards; None if no layer is named.
    """
    if not inits:
        return None
    # Imported here, because it takes seconds that commands which only read a run need not wait for.
    from peft import LoraConfig, get_peft_model

    first = next(iter(inits.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=dropout,
        # A regular expression: PEFT would match a list of full names by suffix as well.
        target_modules=r"(" + "|".join(name.replace(".", r"\.") for name in inits) + r")",
        rank_pattern={f"^{name}": init.rank for name, init in inits.items() if init.rank != first.rank},
        alpha_pattern={f"^{name}": init.alpha for name, init in inits.items() if init.alpha != first.alpha},
    )
    wrapper = get_peft_model(model, config, autocast_adapter_dtype=not master_copies)
    if getattr(model, "is_activation_checkpointing", False):
        # PEFT has made the embeddings require a gradient, which only re-entrant recomputation needs.
        model.disable_input_require_grads()
    adapters = lora_layers(model)
    if set(adapters) != set(inits):
        raise RuntimeError(
            f"PEFT adapted {len(adapters)} layers where {len(inits)} were named: "
            f"{sorted(set(adapters) ^ set(inits))[:3]}"
        )
    for name, init in inits.items():
        layer = adapters[name]
        with torch.no_grad():
            if init.A is not None:
                layer.lora_A[ADAPTER].weight.copy_(init.A)
            if init.B is not None:
                layer.lora_B[ADAPTER].weight.copy_(init.B)
    freeze_A(model, [name for name, init in inits.items() if not init.train_A])
    _freeze(model, "lora_B", [name for name, init in inits.items() if not init.train_B], ADAPTER)
    return wrapper


def freeze_A(model: nn.Module, names: Collection[str] | None = None, adapter: str = ADAPTER) -> int:
    """Freeze A of LoRA layers in a way that PEFT's `set_adapter` respects, which undoes `requires_grad_`.

    PEFT saves nothing of it: an adapter that is loaded again with `is_trainable=True` has to be frozen again.

    Args:
        model: a model with LoRA layers, a `PeftModel` or the model inside.
        names: full names of the layers within `model`; all when None.
        adapter: name of the adapter.

    Returns:
        the number of layers with a frozen A.
    """
    return _freeze(model, "lora_A", names, adapter)


def _freeze(model: nn.Module, factor: str, names: Collection[str] | None, adapter: str) -> int:
    """Freeze `lora_A` or `lora_B` of the named layers; see `freeze_A`."""
    count = 0
    for name, layer in lora_layers(model).items():
        if adapter not in layer.lora_A or (names is not None and name not in names):
            continue
        if hasattr(layer, "frozen_peft_weight_names"):
            frozen = (*layer.frozen_peft_weight_names.get(adapter, ()), factor)
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: frozen}
        getattr(layer, factor)[adapter].weight.requires_grad_(False)
        count += 1
    return count


@contextmanager
def insert_between(layer: LoraLayer, module: nn.Module) -> Iterator[None]:
    """Put a module between A and B of a LoRA layer, whose update becomes scale · B module(A x).

    The module is a submodule of A, so that checkpoints, ZeRO and the optimiser know its parameters.

    Args:
        layer: the layer.
        module: maps (..., r) to (..., r), on the layer's device.
    """
    A = layer.lora_A[ADAPTER]
    A.add_module(BETWEEN, module)
    hook = A.register_forward_hook(lambda _, args, output: module(output))
    try:
        yield
    finally:
        hook.remove()
        delattr(A, BETWEEN)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return every LoRA layer of a model by full name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapters(model: nn.Module, inits: Mapping[str, AdapterInit] = {}) -> dict[str, Delta]:
    """Return layer name → copies of the adapters' current A and B in fp32.

    Frozen factors are taken from their initial values: a bf16 engine has rounded them, so that A is no longer
    exactly orthogonal to the protected subspace.

    Args:
        model: the model with adapters, while the engine that trained it still exists.
        inits: as given to `attach`; without them, A is read from the model like B.
    """
    deltas = {}
    for name, layer in lora_layers(model).items():
        init = inits.get(name)
        frozen = (
            (None, None)
            if init is None
            else (None if init.train_A else init.A, None if init.train_B else init.B)
        )
        A, B = (
            trained_values(factor[ADAPTER].weight) if value is None else value.float().clone()
            for factor, value in zip((layer.lora_A, layer.lora_B), frozen, strict=True)
        )
        deltas[name] = Delta(A, B, float(layer.scaling[ADAPTER]))
    return deltas


def since_start(delta: Delta, init: AdapterInit) -> Delta:
    """Return an adapter's update minus its initial value, on the host; a frozen B is kept whole."""
    start = init.B if init.B is not None and init.train_B else 0
    return Delta(delta.A.cpu(), delta.B.cpu() - start, delta.scale)


def detach(wrapper: PeftModel | None) -> None:
    """Remove the adapters, so that the model has its original linear layers and unchanged base weights."""
    if wrapper is not None:
        wrapper.unload()
