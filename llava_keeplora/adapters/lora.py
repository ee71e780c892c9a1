"""PEFT LoRA adapters on a named set of linear layers, for the training of one task.

Legend: in / out features of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True)
class AdapterInit:
    """Initial values of one layer's adapter.

    Args:
        rank: r.
        alpha: the scale s is alpha / rank.
        A: (r, in), or None for PEFT's Kaiming-uniform initialisation.
        B: (out, r), or None for zeros.
        train_A: whether A is trained as well as B.
    """

    rank: int
    alpha: float
    A: Tensor | None = None
    B: Tensor | None = None
    train_A: bool = False

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
        if not init.train_A:
            _freeze_A(layer)
    return wrapper


def _freeze_A(layer: LoraLayer) -> None:
    """Freeze A in a way that PEFT's `set_adapter` respects, which undoes a mere `requires_grad_`."""
    if hasattr(layer, "frozen_peft_weight_names"):
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, ADAPTER: ("lora_A",)}
    layer.lora_A[ADAPTER].weight.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return every LoRA layer of a model by full name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapters(model: nn.Module, inits: Mapping[str, AdapterInit] = {}) -> dict[str, Delta]:
    """Return layer name → copies of the adapters' current A and B in fp32.

    A frozen A is taken from its initial values: a bf16 engine has rounded it, so that it is no longer exactly
    orthogonal to the protected subspace.

    Args:
        model: the model with adapters, while the engine that trained it still exists.
        inits: as given to `attach`; without them, A is read from the model like B.
    """
    frozen = {name: init.A for name, init in inits.items() if init.A is not None and not init.train_A}
    deltas = {}
    for name, layer in lora_layers(model).items():
        A = frozen[name].float().clone() if name in frozen else trained_values(layer.lora_A[ADAPTER].weight)
        deltas[name] = Delta(A, trained_values(layer.lora_B[ADAPTER].weight), float(layer.scaling[ADAPTER]))
    return deltas


def detach(wrapper: PeftModel | None) -> None:
    """Remove the adapters, so that the model has its original linear layers and unchanged base weights."""
    if wrapper is not None:
        wrapper.unload()
