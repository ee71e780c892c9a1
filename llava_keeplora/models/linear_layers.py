"""Linear layers by part and leaf name, with a refusal where a name matches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from llava_keeplora.config import ALL_LINEAR
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.models.layouts import part_of


def find_linear_layers(
    model: nn.Module, prefixes: Mapping[str, str], part: str, targets: Sequence[str]
) -> dict[str, nn.Linear]:
    """Return full name → linear layer, for the leaf names `targets` or `all-linear` of a part.

    PEFT's `all-linear` means every linear layer of the model but its output layer (`lm_head`). Here it is
    every one of the part; output layers, embeddings and what lies outside of the parts are in none.

    Args:
        model: the plain model.
        prefixes: part → dotted prefix of its layers.
        part: which part.
        targets: leaf names such as `q_proj`.

    Raises:
        ConfigError: for an unknown part, one without linear layers, or a target that matches none of them.
    """
    if part not in prefixes:
        raise ConfigError(f"parts names '{part}', which this model does not have", nearest(part, prefixes))
    linear = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and part_of(n, prefixes) == part
    }
    if not linear:
        raise ConfigError(
            f"the part '{part}' is '{prefixes[part]}', and the model has no linear layer below that",
            "give the dotted name of a list of layers, as model.named_modules() has it, in model.parts",
        )
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    if tuple(targets) == (ALL_LINEAR,):
        return linear
    for target in targets:
        if target not in leaves:
            raise ConfigError(
                f"parts.{part}.targets names '{target}', which matches no linear layer of that part",
                nearest(target, leaves),
            )
    return {name: layer for name, layer in linear.items() if name.rsplit(".", 1)[-1] in targets}
