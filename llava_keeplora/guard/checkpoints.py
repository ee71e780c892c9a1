"""The verdict on two checkpoints or adapters that were made elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_keeplora.config.guard import DropLimit
from llava_keeplora.errors import ConfigError, UserError
from llava_keeplora.files import write_json
from llava_keeplora.guard.answering import answer, other_size
from llava_keeplora.guard.judge import WATCH, Limit, judge
from llava_keeplora.run_folder import GUARD, THEN, file_name
from llava_keeplora_eval.models import ADAPTER, load_predictor, made_by
from llava_keeplora_eval.paired_scores import check_comparable, paired_change
from llava_keeplora_eval.predictors import default_device
from llava_keeplora_eval.preparation import check_questions
from llava_keeplora_eval.references import metric_of
from llava_keeplora_recipes import Recipe, TaskData, load_recipe, load_split


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how it is answered.

    Args:
        base, tuned: the two models: folders with a checkpoint or an adapter, or ids on the Hub.
        max_drop: largest accepted drop of each recipe's score, in points.
        confidence: of all limits together.
        into: the folder of answers and verdict; answers that are there already are kept.
        data_root: the folder that relative paths of recipes start from.
        batch_size: examples per forward pass.
        max_new_tokens: most tokens of an answer.
    """

    base: str
    tuned: str
    max_drop: float
    confidence: float
    into: Path
    data_root: str | None = None
    batch_size: int = 64
    max_new_tokens: int = 128


def compare_checkpoints(given: Comparison, watch: Sequence[str]) -> dict[str, Any]:
    """Answer the recipes with both models, write `guard.json`, and return the verdict.

    Args:
        given: the models and the limits.
        watch: the recipes, by name or file.

    Raises:
        ConfigError: the guard can't be evaluated.
    """
    try:
        splits = [load_split(recipe, "test", given.data_root) for recipe in load_recipes(watch)]
        for data in splits:
            metric_of(data.recipe).check_installed()
            check_comparable(data)
        limits = [_limit(given, data) for data in splits]
    except UserError as error:
        raise ConfigError(f"the guard can't be evaluated: {error.problem}", error.cure) from error
    verdict = judge(given.tuned, limits, given.confidence) | {THEN: None}
    write_json(given.into / GUARD, verdict)
    return verdict


def load_recipes(watch: Sequence[str]) -> list[Recipe]:
    """Return the recipes of `watch`, by name or file.

    Raises:
        RecipeError: one can't be read.
        ConfigError: two have the same name, and would count as two limits.
    """
    recipes = [load_recipe(task) for task in watch]
    names = [recipe.name for recipe in recipes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--watch has the recipe '{twice[0]}' twice", "name it once")
    return recipes


def _limit(given: Comparison, data: TaskData) -> Limit:
    before = _answers(given, given.base, "base", data)
    after = _answers(given, given.tuned, "tuned", data)
    again = _answers(given, given.base, "noise", data, otherwise=True)
    noise = abs(paired_change(data, before, again, 0.95).points)
    least = DropLimit(given.max_drop).least
    assert least is not None, "a number was given"
    return Limit(WATCH, data, before, after, least, noise)


def _answers(
    given: Comparison, model: str, folder: str, data: TaskData, otherwise: bool = False
) -> dict[str, str]:
    """Return a model's answers, from its file as far as they are there.

    The file is named after the model's content and the data's, so that a changed model, or a changed recipe,
    is answered anew, and the base is not.

    Args:
        given, data: what is compared, and the examples.
        model: the model.
        folder: where its answers are kept.
        otherwise: whether to answer with other batches, in another precision.
    """
    base = given.base if folder == "tuned" and _is_adapter_of(given) else None
    device = torch.device(default_device())
    predictor = load_predictor(model, data.recipe, str(device), given.max_new_tokens, base)
    check_questions(predictor.preparation, data)
    maker = made_by(model, predictor, base)
    if otherwise:
        maker |= {"noise": f"batches of {other_size(given.batch_size)}, bfloat16"}
    path = given.into / folder / f"{file_name(data.recipe.name)}-{_key(maker, data)}.jsonl"
    return answer(predictor, data, path, given.batch_size, device, maker, otherwise)


def _key(maker: Mapping[str, Any], data: TaskData) -> str:
    """Return a name for what answers depend on."""
    content = [maker, data.recipe.name, data.recipe.version, data.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _is_adapter_of(given: Comparison) -> bool:
    """Return whether the tuned model is an adapter and the base a whole model, which it is put on."""
    tuned, base = ((Path(name) / ADAPTER).is_file() for name in (given.tuned, given.base))
    return tuned and not base


def append_step_summary(text: str) -> None:
    """Append Markdown to the summary of a GitHub Actions step, where this is one."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
