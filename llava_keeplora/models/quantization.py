"""Bases that bitsandbytes keeps in four or eight bits: how they are loaded.

Source: Dettmers et al., QLoRA (2023, arXiv:2305.14314) for `nf4`, LLM.int8() (2022, arXiv:2208.07339) for
`int8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def quantization_kwargs(
    kind: str | None, dtype: torch.dtype, skip_quantization: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load linear layers in a quantised form.

    Nothing where the kind is None.

    Args:
        kind: `nf4` (its scales quantised too) or `int8`.
        dtype: that products are computed in.
        skip_quantization: dotted prefixes of what stays as it is.
    """
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    forms = {
        "nf4": dict(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": dict(load_in_8bit=True),
    }
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    return {
        "quantization_config": BitsAndBytesConfig(
            **forms[kind], llm_int8_skip_modules=list(skip_quantization)
        ),
        "device_map": {"": device},
    }


def keep_form(model: nn.Module) -> None:
    """Let quantised weights stay in the form that they were loaded in.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in place in its first evaluation, after
    which it can neither be trained through nor expanded. A weight that has been is unpacked, with scales that
    the packing has rounded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.state_dict()  # Unpacks.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def leave_checkpoint(model: nn.Module) -> None:
    """Copy what was not quantised out of the checkpoint's mapped file.

    One view into it keeps all of its pages in memory.
    """
    for p in model.parameters():
        if p.device.type == "cpu" and p.is_floating_point():
            p.data = p.data.clone()
