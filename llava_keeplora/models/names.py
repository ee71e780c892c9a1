"""Linear layers by part and leaf name, with a refusal where a name matches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from llava_keeplora.errors import ConfigError, nearest


def find_linear_layers(model: nn.Module, prefixes: Mapping[str, str], part: str, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Full name → linear layer, for the leaf names `targets` under the part's prefix.

    Args:
        model: the plain model.
        prefixes: part → dotted prefix of its layers.
        part: which part.
        targets: leaf names such as `q_proj`.

    Raises:
        ConfigError: for an unknown part, or a target that matches no linear layer of it.
    """
    if part not in prefixes:
        raise ConfigError(f"parts names '{part}', which this model does not have", nearest(part, prefixes))
    linear = {n: m for n, m in model.named_modules() if n.startswith(prefixes[part] + ".") and isinstance(m, nn.Linear)}
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    for target in targets:
        if target not in leaves:
            raise ConfigError(f"parts.{part}.targets names '{target}', which matches no linear layer of that part", nearest(target, leaves))
    return {name: layer for name, layer in linear.items() if name.rsplit(".", 1)[-1] in targets}
