"""Settings of generation: greedy by default, others by the names of transformers' `GenerationConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes.errors import nearest

#: Settings of transformers' `GenerationConfig` that a user may choose, and the type of each. Sampling is not
#: among them: a run that is resumed, or has another number of processes, could not reproduce it.
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "num_beams": int,
    "length_penalty": (int, float),
    "early_stopping": bool,
    "repetition_penalty": (int, float),
    "no_repeat_ngram_size": int,
    "min_new_tokens": int,
    "suppress_tokens": list,
    "begin_suppress_tokens": list,
}

#: Most tokens of an answer, by default.
MAX_NEW_TOKENS = 128

#: Setting → its smallest value.
LOWEST = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "repetition_penalty": 1e-3}


def check_generation(settings: Mapping[str, Any], where: str = "generation") -> dict[str, Any]:
    """Check settings of generation.

    Args:
        settings: names of `SETTINGS` and their values.
        where: the settings' key in a configuration, for errors.

    Returns:
        the settings.

    Raises:
        EvalError: a name is unknown, or a value has the wrong type or range.
    """
    for key, value in settings.items():
        if key not in SETTINGS:
            why = (
                "could not be repeated by a run that was stopped"
                if key in ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")
                else "cannot be set"
            )
            raise EvalError(f"{where}.{key} {why}", nearest(key, SETTINGS))
        kind = SETTINGS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
            raise EvalError(f"{where}.{key} is {value!r}, but it takes {names}", "mend the value")
    if not settings:
        return {}
    from transformers import GenerationConfig  # Takes seconds to import, so only where settings are given.

    for key in ("suppress_tokens", "begin_suppress_tokens"):
        if any(type(token) is not int or token < 0 for token in settings.get(key, ())):
            raise EvalError(
                f"{where}.{key} is {settings[key]!r}, but it lists ids of tokens", "write whole numbers"
            )
    for key, lowest in LOWEST.items():
        if not settings.get(key, lowest) >= lowest:
            raise EvalError(f"{where}.{key} is {settings[key]}, but it is {lowest} or more", "mend the value")
    for key in ("repetition_penalty", "length_penalty"):
        if not math.isfinite(settings.get(key, 1.0)):
            raise EvalError(f"{where}.{key} is {settings[key]}, which is no number", "mend the value")
    try:
        GenerationConfig(**{"max_new_tokens": 1, **settings}).validate()
    except (ValueError, TypeError) as error:
        raise EvalError(f"{where} cannot be used ({str(error).splitlines()[0]})", "mend the value") from error
    return dict(settings)
