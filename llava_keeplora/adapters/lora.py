"""PEFT LoRA layers on a named set of linear layers, for the length of one task.

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
    """How one layer's adapter starts.

    Args:
        rank: r.
        alpha: the scale s is alpha / rank.
        A: (r, in), or None for PEFT's Kaiming-uniform start.
        B: (out, r), or None for zeros.
        train_A: whether A is trained beside B.
    """

    rank: int
    alpha: float
    A: Tensor | None = None
    B: Tensor | None = None
    train_A: bool = False

    @property
    def scale(self) -> float:
        """S = alpha / rank."""
        return self.alpha / self.rank


def attach(
    model: nn.Module, inits: Mapping[str, AdapterInit], dropout: float = 0.0, master_copies: bool = False
) -> PeftModel | None:
    """Put a LoRA adapter on each named linear layer; everything else is frozen.

    Args:
        model: the model; its linear layers become `peft` LoRA layers in place.
        inits: full layer name → start values.
        dropout: on the adapter's input while training.
        master_copies: whether the optimiser keeps fp32 copies of what it trains, as DeepSpeed's does;
            adapters then have the base's dtype, which ZeRO-3 needs to be one and the same, and fp32
            otherwise.

    Returns:
        the PEFT wrapper, None where no layer is named; give it to `detach` afterwards.
    """
    if not inits:
        return None
    # Seconds of imports, which commands that only read a run needn't wait for.
    from peft import LoraConfig, get_peft_model

    first = next(iter(inits.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=dropout,
        # A list of full names would also match by suffix; anchored, each name matches itself alone.
        target_modules=r"(" + "|".join(name.replace(".", r"\.") for name in inits) + r")",
        rank_pattern={f"^{name}": init.rank for name, init in inits.items() if init.rank != first.rank},
        alpha_pattern={f"^{name}": init.alpha for name, init in inits.items() if init.alpha != first.alpha},
    )
    wrapper = get_peft_model(model, config, autocast_adapter_dtype=not master_copies)
    if getattr(model, "is_activation_checkpointing", False):
        # PEFT has the embeddings ask for a gradient then, which only the re-entrant form of recomputing
        # needs.
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
    """Freeze A so that PEFT's own `set_adapter` does not thaw it again (it does after `requires_grad_`)."""
    if hasattr(layer, "frozen_peft_weight_names"):
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, ADAPTER: ("lora_A",)}
    layer.lora_A[ADAPTER].weight.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoRA layer of a model by full name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapters(model: nn.Module, inits: Mapping[str, AdapterInit] = {}) -> dict[str, Delta]:
    """The adapters' present A and B in fp32, copied, by layer name.

    A frozen A is the one that it started from, exactly: in a bf16 engine it was rounded, and no longer quite
    orthogonal to what it must not touch.

    Args:
        model: the model with adapters, still in the hands of what trained it.
        inits: as given to `attach`; without them, A is read like B.
    """
    frozen = {name: init.A for name, init in inits.items() if init.A is not None and not init.train_A}
    found = {}
    for name, layer in lora_layers(model).items():
        A = frozen[name].float().clone() if name in frozen else trained_values(layer.lora_A[ADAPTER].weight)
        found[name] = Delta(A, trained_values(layer.lora_B[ADAPTER].weight), float(layer.scaling[ADAPTER]))
    return found


def detach(wrapper: PeftModel | None) -> None:
    """Take the adapters off again; the model's linear layers are plain and its base weights untouched."""
    if wrapper is not None:
        wrapper.unload()
