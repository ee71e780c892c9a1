"""The bound on the number of layers that a checkpoint's configuration may ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llava_keeplora_eval.errors import EvalError

#: More than any published model has; building a thousand takes seconds, and ten million would not end.
MOST_LAYERS = 1000
COUNTS = re.compile(r"(num_|n_|encoder_|decoder_)(hidden_)?layers?|depth|num(_local|_routed)?_experts")


def check_layer_count(config: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration with more layers than any model has, before they are built.

    Args:
        config: what config.json holds, with the configurations of the model's parts.
        name: of the model, for the error.

    Raises:
        EvalError: naming the key and its value.
    """
    for key, count in _counts(config):
        if count > MOST_LAYERS:
            raise EvalError(
                f"the config.json of '{name}' has {key} {count}, and at most {MOST_LAYERS} are read",
                "correct it, or download the checkpoint again",
            )


def _counts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield dotted key and value of every number of layers or experts."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{prefix}{key}.")
        elif isinstance(value, int) and COUNTS.fullmatch(key):
            yield f"{prefix}{key}", value
