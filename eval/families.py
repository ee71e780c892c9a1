"""Models that a plug-in family loads and runs (`--family`), of any type of checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora_eval.checkpoints import check_device
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.generation import MAX_NEW_TOKENS
from llava_keeplora_eval.models import adapter_base, check_exported_base, with_adapter
from llava_keeplora_eval.preparation import Preparation, Report
from llava_keeplora_recipes import Example, Recipe, TaskData
from llava_keeplora_recipes.errors import UserError

#: Function that opens a model of a plug-in, in the training package, which is imported only for that.
OPENER = ("llava_keeplora.models.evaluation", "open_family")


class FamilyPreparation:
    """Preparation of a family without a `preparation` attribute, by its check of a split.

    Args:
        family: see `llava_keeplora.models.Family`.
    """

    def __init__(self, family: Any):
        self.family = family

    def learn(self, data: TaskData) -> None:
        """Refuse a split that the family cannot learn."""
        self.family.check(data)

    ask = learn

    def short_answers(self, questions: Any) -> str:
        """Return an empty note: the family does not limit the length of answers."""
        return ""

    def report(self, data: TaskData, learns: bool) -> Report:
        """Report the family's refusal of a split, if any."""
        try:
            self.family.check(data)
        except UserError as error:
            return Report("", [EvalError(error.problem, error.cure)])
        return Report("", [])

    def show(self, data: TaskData, row: int) -> list[str]:
        """Return an example's question and its first answer."""
        question, answer = data.questions[row], data.answers[row][0]
        return f"{question + ' ' if question else ''}⟦{answer}⟧".split("\n")


class FamilyPredictor:
    """Predictor of a task by a model of a family.

    Args:
        family: the family, with its weights loaded.
        recipe: the task.
        identity: the family's identity, as JSON data.
    """

    def __init__(self, family: Any, recipe: Recipe, identity: Mapping[str, Any]):
        self._predictor = family.predictor(recipe, _Images(family))
        self.preparation = preparation_of(family)
        self.settings = {**identity, **getattr(self._predictor, "settings", {})}

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """Return one answer per example, in order."""
        return self._predictor.predict(examples)


class _Images:
    """Model inputs of images, made on access; see `llava_keeplora.models.Images`."""

    def __init__(self, family: Any):
        self.of = family.prepare


def preparation_of(family: Any) -> Preparation:
    """Return the family's `preparation`, or a `FamilyPreparation` if it has none."""
    return getattr(family, "preparation", None) or FamilyPreparation(family)


def load_family_predictor(
    plugin: str,
    name: str,
    recipe: Recipe,
    device: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    base: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> FamilyPredictor:
    """Load the predictor of a task for a checkpoint, or an adapter of one, that a plug-in family opens.

    Args:
        plugin: the family's name, `module:Object` or `path/to/file.py:Object`.
        name, recipe, device, max_new_tokens, base, generation: as for `load_predictor`.

    Raises:
        UserError: the family, the model or the adapter cannot be loaded, or cannot answer the task's kind.
    """
    import torch  # Seconds to import, which a check without a model doesn't need.

    check_device(device)
    adapted = adapter_base(name, base)
    source, revision = adapted or (name, None)
    family, identity = _open(plugin, source, revision, max_new_tokens, generation or {})
    if recipe.kind not in family.kinds:
        raise EvalError(
            f"'{recipe.name}' is a {recipe.kind} task, and the family '{plugin}' answers "
            f"{', '.join(family.kinds)}",
            "take another task or family",
        )
    family.load(getattr(getattr(family, "config", None), "dtype", None) or torch.float32)
    if adapted is not None:
        check_exported_base(Path(name), source, revision)
        family.model = with_adapter(family.model, name)
    family.model.to(device)
    return FamilyPredictor(family, recipe, identity)


def load_family_preparation(plugin: str, name: str, base: str | None = None) -> Preparation:
    """Load the preparation of a plug-in family, without the model's weights; see `load_preparation`."""
    name, revision = adapter_base(name, base) or (name, None)
    return preparation_of(_open(plugin, name, revision, MAX_NEW_TOKENS, {})[0])


def _open(plugin: str, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    module, function = OPENER
    return getattr(importlib.import_module(module), function)(plugin, *arguments)
