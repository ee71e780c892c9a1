"""Checks of KeepLoRA's settings."""

from __future__ import annotations

import math
from typing import Any

from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.info import check_effect
from llava_keeplora.methods.kept_features import check_kept_features
from llava_keeplora.methods.presets import RULES
from llava_keeplora.methods.prototypes import check_rejection
from llava_keeplora.methods.shares import AUTO, check_fraction

CHOICES = {
    "preset": tuple(RULES),
    "form": ("delta", "literal"),
    "init": ("gradient", "random"),
    "gradient": ("sketch", "dense"),
    "feature_rule": ("energy", "splitlora"),
}


def value_of(options: Any, name: str) -> Any:
    """Return a setting that presets have too: the option, or the preset's where it is None."""
    given = getattr(options, name)
    return getattr(RULES[options.preset], name) if given is None else given


def check_options(options: Any) -> None:
    """Check the settings of KeepLoRA against each other.

    Args:
        options: `KeepLora.Options`.

    Raises:
        MethodError: naming the setting.
    """
    for name, valid in CHOICES.items():
        value = getattr(options, name)
        if value not in valid and not (name in ("form", "gradient") and value is None):
            raise MethodError(
                f"{name} must be one of {', '.join(valid)} (got '{value}')",
                nearest(str(value), valid),
            )
    for name in ("gradient_fraction", "feature_fraction"):
        check_fraction(name, getattr(options, name))
    if options.feature_fraction not in (AUTO, 1.0) and RULES[options.preset].evidence == "gradient":
        raise MethodError(
            f"feature_fraction is {options.feature_fraction}, but the preset '{options.preset}' reads "
            "gradients instead of features",
            "set gradient_fraction",
        )
    if options.feature_rule != "energy" and RULES[options.preset].released:
        raise MethodError(
            f"feature_rule is '{options.feature_rule}', but the preset '{options.preset}' follows released "
            "code, which has ε_f alone",
            "use the preset 'paper'",
        )
    if not options.plasticity >= 0.0:
        raise MethodError(
            f"plasticity must not be negative (got {options.plasticity})", "set it to 20, as published"
        )
    check_effect(options, ("plasticity",), "feature_rule", "splitlora")
    _check_updates(options)
    check_rejection(value_of(options, "rejection"))
    if options.gradient == "sketch" and RULES[options.preset].gradient == "dense":
        raise MethodError(
            f"gradient is 'sketch', but the preset '{options.preset}' sums gradients in full, as the "
            "released code does",
            "remove `gradient: sketch`",
        )


def _check_updates(options: Any) -> None:
    """Check the settings that change a task's update or its loss."""
    literal = value_of(options, "form") == "literal"
    if options.interpolation is not None and not 0.0 < options.interpolation <= 1.0:
        raise MethodError(
            f"interpolation must be in (0, 1] (got {options.interpolation})",
            "set it to 1 to merge the whole of a task's update",
        )
    if options.update_bound is not None and not 0.0 < options.update_bound < math.inf:
        raise MethodError(
            f"update_bound must be a positive number (got {options.update_bound})",
            "set it to null for no bound",
        )
    if options.update_bound is not None and literal:
        raise MethodError(
            "update_bound is relative to the weight at the task's start, from which the literal form does "
            "not start",
            "set form to 'delta', or update_bound to null",
        )
    if options.distillation is not None:
        check_kept_features(options.distillation)
    if value_of(options, "distillation") and literal:
        raise MethodError(
            "distillation takes the model at the task's start as teacher, from which the literal form "
            "does not start",
            "set form to 'delta', or distillation to 0",
        )
