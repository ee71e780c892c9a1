"""The update of a task from its trained adapters, with checks that nothing else was trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llava_keeplora.adapters import ADAPTER, AdapterInit, Delta, lora_layers, read_adapters, since_start
from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.errors import MethodError
from llava_keeplora.memory.fingerprint import find_changed


def read_update(
    model: nn.Module, task: str, inits: Mapping[str, AdapterInit], frozen: Mapping[str, str]
) -> dict[str, Delta]:
    """Return a task's update, after a check that training changed B, all of it, and nothing but B.

    Args:
        model: the model with its adapters.
        task: the task's name.
        inits: the adapters as the task began.
        frozen: fingerprints of what is not trained.

    Raises:
        MethodError: naming the layer or tensor.
    """
    layers = lora_layers(model)
    if missing := sorted(set(inits) - set(layers)):
        raise MethodError(
            f"{len(missing)} of {len(inits)} layers of task '{task}' have lost their adapters, "
            f"first {missing[0]}",
            "end the task before the adapters are merged or unloaded; begin it again with cancel_task",
        )
    for name, init in inits.items():
        weight = layers[name].lora_A[ADAPTER].weight
        assert init.A is not None
        if not torch.equal(trained_values(weight).cpu().to(weight.dtype), init.A.to(weight.dtype)):
            raise MethodError(
                f"training moved A of {name}, which keeps task '{task}' outside of the protected subspace",
                "freeze it again with llava_keeplora.freeze_A(model) after adapters are loaded, and train "
                "from begin_task's model",
            )
    if moved := find_changed(model, frozen):
        raise MethodError(
            f"training changed {len(moved)} frozen tensors of the model, first {moved[0]}, which belong "
            "to no update",
            "train B alone: load the model in the dtype that it is trained in, and keep other "
            "parameters, and statistics of normalisation layers, fixed",
        )
    deltas = {
        name: since_start(delta, inits[name])
        for name, delta in read_adapters(model, inits).items()
        if name in inits
    }
    for name, delta in deltas.items():
        if not torch.isfinite(delta.B).all():
            raise MethodError(
                f"B of {name} is not finite after the training of task '{task}'",
                "cancel_task and train again with a lower learning rate",
            )
    if not any(bool(delta.B.any()) for delta in deltas.values()):
        raise MethodError(
            f"no adapter of task '{task}' has changed since begin_task",
            "train the model that begin_task returned, or call cancel_task",
        )
    return deltas
