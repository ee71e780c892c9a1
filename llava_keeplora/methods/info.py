"""Description of a method for lists and tables, and what holds for the settings of all methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llava_keeplora.errors import IdleOptionError, MethodError

#: Every value of an option but None.
ANY = object()


def check_finite(options: Any) -> Any:
    """Return a method's settings.

    Raises:
        MethodError: one of them is not finite.
    """
    for setting in fields(options):
        value = getattr(options, setting.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise MethodError(
                f"{setting.name} must be finite (got {value})", f"its default is {setting.default}"
            )
    return options


def check_effect(options: Any, names: Sequence[str], other: str, value: Any = ANY) -> None:
    """Check that options are not set while another one has a value with which they do nothing.

    A default does nothing anyway, and is taken. A weight of 0 is the end of its range, and what belongs to it
    is taken as well.

    Args:
        options: a method's settings.
        names: the options.
        other: the option that they belong to.
        value: the value of it with which they have an effect; `ANY` for all but None.

    Raises:
        IdleOptionError: naming the first that is set.
    """
    given, defaults = getattr(options, other), {option.name: option.default for option in fields(options)}
    if given == value or (value is ANY and given is not None):
        return
    for name in names:
        if (own := getattr(options, name)) == defaults[name]:
            continue
        if value is ANY:
            when, cure = f"with {other} (got {name} {own!r} without it)", f"set {other}"
        elif value is None:
            when, cure = f"without {other} (got {name} {own!r} with {other} {given!r})", f"remove {other}"
        else:
            when = f"with {other} {value!r} (got {name} {own!r} with {other} {given!r})"
            cure = f"set {other} to {value!r}"
        raise IdleOptionError(name, defaults[name], when, cure)


#: The families in words, as lists name them; a plug-in's has its name.
IN_WORDS = {"clip": "models of two encoders", "llava": "models that write"}


@dataclass(frozen=True)
class MethodInfo:
    """Description of a method for lists and tables.

    Args:
        name: its name in a configuration.
        title: title of the paper or idea.
        url: address of the paper.
        reference_data: whether it needs data other than the tasks'.
        task_id_at_test: whether it needs to know the task at test time.
        inference_cost: extra computation at inference.
        extra_parameters: what the model has at inference in addition to the base's parameters.
        mergeable: whether its result merges into the base's weights.
        kept: what is stored for later tasks in addition to the finished tasks' deltas.
        trained: what a task trains.
        families: the model families that it runs on.
        model_types: the types of models among them, by transformers' names, that it runs on; all when empty.
        variants: what is otherwise with some settings; lists have it after whether it merges.
    """

    name: str
    title: str
    url: str = ""
    reference_data: bool = False
    task_id_at_test: bool = False
    inference_cost: str = "none"
    extra_parameters: str = "none"
    mergeable: bool = True
    kept: str = "nothing"
    trained: str = "A and B"
    families: tuple[str, ...] = ("clip", "llava")
    model_types: tuple[str, ...] = ()
    variants: str = ""

    @property
    def needs(self) -> str:
        """A sentence on the families that it runs on, what it needs, and its cost at inference."""
        inputs = ["reference data"] * self.reference_data + ["the task at test time"] * self.task_id_at_test
        cost = [] if self.inference_cost == "none" else [f"extra at test: {self.inference_cost}"]
        merging = "merges" if self.mergeable else "does not merge"
        families = [IN_WORDS.get(family, family) for family in self.families]
        return "; ".join(
            [
                f"{', '.join(self.model_types)} only" if self.model_types else " and ".join(families),
                *(f"needs {extra}" for extra in inputs),
                *cost,
                f"{merging} ({self.variants})" if self.variants else merging,
            ]
        )
