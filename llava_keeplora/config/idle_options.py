"""Options that a run has recorded although they do nothing there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_keeplora.errors import IdleOptionError
from llava_keeplora.registries import METHODS


def without_idle_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded options of a built-in method, with the default of those that have no effect.

    Earlier versions accepted them, and their runs go on; a configuration that sets one now is refused. One of
    the settings of the method that `individual` trains with is left out. Options that are wrong in another
    way are returned as they are, since their reader names them.

    Args:
        name: the method.
        options: its options, or some of them.
    """
    current: dict[str, Any] = dict(options)
    if METHODS.is_plugin(name):  # Its code is not run to read a record.
        return current
    while (error := _idle(name, current)) and (changed := _without(current, error)) != current:
        current = changed
    return current


def _idle(name: str, options: Mapping[str, Any]) -> IdleOptionError | None:
    """Return the error of the first option without an effect; None if there is none."""
    try:
        METHODS[name].Options(**options)
    except IdleOptionError as error:
        return error
    except Exception:
        return None
    return None


def _without(options: dict[str, Any], error: IdleOptionError) -> dict[str, Any]:
    """Return options with the default of the one that an error names, or without it if it is in a mapping."""
    if error.option in options:
        return options | {error.option: error.default}
    return {
        key: {inner: setting for inner, setting in value.items() if inner != error.option}
        if isinstance(value, Mapping)
        else value
        for key, value in options.items()
    }
