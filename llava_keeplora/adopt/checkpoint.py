"""Reading of a merged checkpoint as the difference of its weights from a run's base.

Legend: in / out features of a layer, r rank, W₀ and W₁ (out, in) a weight in base and checkpoint, u = 2⁻²⁴
the unit roundoff of fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from llava_keeplora.adapters import Delta, FullDelta, full_deltas
from llava_keeplora.errors import RunError
from llava_keeplora_eval.checkpoints import load_checked, weight_files

UNIT_ROUNDOFF = 2.0**-24
#: What a base in fp32 may have been rounded to.
ROUNDED = (torch.bfloat16, torch.float16)
#: The smaller side of a weight up to which its whole SVD is taken, and the directions of a truncated one.
WHOLE, TRUNCATED = 1024, 288


def read_checkpoint(folder: Path, base: nn.Module, auto_class: str) -> dict[str, Delta | FullDelta]:
    """Return what a checkpoint changes of its base, module by module.

    The difference is stored exactly (in fp32). It is stored as B A instead where that differs by less than
    fp32 rounds, as it does for a LoRA that was merged in fp32. A tensor that is the base's, rounded to half
    precision as a whole checkpoint may be, is no change. The checkpoint is held as it is stored, and what was
    compared is let go.

    Args:
        folder: the checkpoint's folder.
        base: the run's base with the weights of its files.
        auto_class: the class of transformers that loads it.

    Raises:
        RunError: it is of another architecture, or equals the base.
        EvalError: it cannot be loaded.
    """
    # The weights alone: what was trained elsewhere may have been saved without its processor.
    after = load_checked(getattr(transformers, auto_class), str(folder), dtype=stored_dtype(folder))
    old, new = dict(base.named_parameters()), dict(after.named_parameters())
    for name in [*old, *new]:
        shapes = [tuple(p[name].shape) if name in p else None for p in (old, new)]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{folder} is of another architecture than the run's base: '{name}' has shape {shapes[1]} "
                f"there and {shapes[0]} here",
                "adopt it into a run of the base that it was made from",
            )
    deltas = {}
    with torch.no_grad():
        for name, module in after.named_modules():
            keys = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
            # A weight that two modules share is a parameter of the first.
            changes = {key: _change(old[key], new.pop(key)) for key in keys if key in new}
            if changes := {key: change for key, change in changes.items() if change is not None}:
                deltas[name] = _smallest(full_deltas(changes)[name], module)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.new_empty(0)
    if not deltas:
        raise RunError(f"{folder} has the weights of the run's base", "adopt what was trained")
    return deltas


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a checkpoint's tensors can be held without rounding.

    That is half precision where a folder's safetensors hold nothing else, and fp32 otherwise.
    """
    files, held = weight_files(folder), set()
    for path in files:
        if path.suffix != ".safetensors":
            return torch.float32
        with safe_open(path, "pt") as tensors:
            held |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(
        held.pop() if len(held) == 1 else "", torch.float32
    )


def _change(old: Tensor, new: Tensor) -> Tensor | None:
    """Return W₁ − W₀ in fp32; None if W₁ is W₀, or W₀ rounded to half precision."""
    old, new = old.cpu().float(), new.float()
    if any(torch.equal(new, old.to(dtype).float()) for dtype in (torch.float32, *ROUNDED)):
        return None
    return (new.double() - old.double()).float()


def _smallest(delta: FullDelta, module: nn.Module) -> Delta | FullDelta:
    """Return a change of a linear layer's weight alone as B A, if that is exact but for rounding in fp32."""
    if not isinstance(module, nn.Linear) or set(delta.parameters) != {"weight"}:
        return delta
    return low_rank(delta.parameters["weight"], module.weight) or delta


def low_rank(change: Tensor, weight: Tensor) -> Delta | None:
    """Return W₁ − W₀ as B A of the lowest rank r with ‖W₁ − W₀ − B A‖ ≤ u ‖W₁‖ (Frobenius).

    Args:
        change: W₁ − W₀.
        weight: W₁.

    Returns:
        the low-rank form; None if it would not be smaller than the change itself.
    """
    change, bound = change.double(), UNIT_ROUNDOFF * float(weight.double().norm())
    most = change.numel() // sum(change.shape)
    if min(change.shape) <= WHOLE:
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(change, q=min(TRUNCATED, most), niter=2)
        Vh = V.T
    rest = float((change - (U * S) @ Vh).norm()) if len(S) < min(change.shape) else 0.0
    # tails[r] = ‖W₁ − W₀ − its best rank-r form‖²
    tails = torch.cat([S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1)]) + rest**2
    fits = (tails <= bound**2).nonzero()
    if not len(fits) or not 0 < (rank := int(fits[0])) < most:
        return None
    root = S[:rank].sqrt()
    return Delta((root[:, None] * Vh[:rank]).float(), (U[:, :rank] * root).float(), 1.0)


def fill_modules(
    deltas: Mapping[str, Delta | FullDelta], modules: Mapping[str, nn.Module]
) -> dict[str, Delta | FullDelta]:
    """Return deltas in which modules that a run trains in full have a change of every parameter, zero or not.

    Args:
        deltas: module name → its change.
        modules: name → module that the run trains in full.
    """
    filled = dict(deltas)
    for name, module in modules.items():
        given = deltas.get(name, FullDelta({}))
        changes = given.changes()
        filled[name] = FullDelta(
            {key: changes.get(key, torch.zeros(p.shape)) for key, p in module.named_parameters(recurse=False)}
        )
    return filled
