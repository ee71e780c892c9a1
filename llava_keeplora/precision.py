"""Whether this machine computes in bfloat16 as fast as the settings expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llava_keeplora.config import RunConfig

#: What `model.dtype` calls it.
BFLOAT16 = "bfloat16"


def cpu_multiplies_bfloat16() -> bool:
    """Return whether oneDNN computes products of bfloat16 matrices here, by torch's own rule.

    It does with AVX-512 and on Arm with bf16. Elsewhere torch falls back to plain loops, which took thirty
    times as long as fp32 products on an AMD EPYC of the third generation.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_precision(config: RunConfig) -> str | None:
    """Return a sentence if a run would compute in bfloat16 on a CPU without instructions for it.

    Args:
        config: the run's configuration.

    Returns:
        what is slow and the settings to change, or None.
    """
    if torch.cuda.is_available() or cpu_multiplies_bfloat16():
        return None
    cures = ["model.dtype=float32"] if config.model.dtype == BFLOAT16 else []
    cures += ["training.bf16=false"] if any(m.training.get("bf16") for m in config.methods.values()) else []
    if not cures:
        return None
    return (
        "torch has no fast products of bfloat16 matrices on this CPU, so that this run may take ten times as "
        f"long as in fp32: {' '.join(cures)}"
    )
