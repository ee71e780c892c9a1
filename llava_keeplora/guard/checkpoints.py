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
from llava_keeplora.guard.answering import answer, model_dtype
from llava_keeplora.guard.judge import WATCH, Limit, judge
from llava_keeplora.guard.noise import Variant, noise_examples, noise_record, variants
from llava_keeplora.guard.watch import check_names, load_watch
from llava_keeplora.run_folder import GUARD, THEN, file_name
from llava_keeplora_eval.models import ADAPTER, adapter_base, load_predictor, made_by, model_family
from llava_keeplora_eval.paired_scores import check_comparable
from llava_keeplora_eval.predictors import default_device
from llava_keeplora_eval.preparation import check_questions
from llava_keeplora_recipes import Recipe, TaskData, load_recipe


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
        for model in (given.base, given.tuned):
            _check_model(model, given)
        splits = [load_watch(recipe, None, given.data_root) for recipe in load_recipes(watch)]
        for data in splits:
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
    check_names([recipe.name for recipe in recipes], key="--watch")
    return recipes


def _check_model(model: str, given: Comparison) -> None:
    """Refuse a model that is not there or of no supported family before the other one answers.

    Raises:
        EvalError: with the reason.
    """
    source, revision = adapter_base(model, _put_on(model, given)) or (model, None)
    model_family(source, revision)


def _limit(given: Comparison, data: TaskData) -> Limit:
    before, noise = _answers_of_base(given, data)
    answerer = _Answerer(given, given.tuned, data)
    after = answerer.answers(data, "tuned", given.batch_size)
    least = DropLimit(given.max_drop).least
    assert least is not None, "a number was given"
    return Limit(WATCH, data, before, after, least, noise)


def _answers_of_base(given: Comparison, data: TaskData) -> tuple[dict[str, str], float]:
    """Return the base's answers and its noise in points."""
    base, few = _Answerer(given, given.base, data), noise_examples(data)
    before = base.answers(data, "base", given.batch_size)
    again = {
        # Loaded anew: one that has answered keeps its classes' features in the model's precision.
        variant.name: _Answerer(given, given.base, data).answers(few, "noise", variant.batch_size, variant)
        for variant in variants(given.batch_size, model_dtype(base.predictor.model))
    }
    return before, float(noise_record(few, before, again)["points"])


class _Answerer:
    """One of the two models, with what it needs to answer a recipe.

    Args:
        given: what is compared.
        model: the model.
        data: examples of the recipe.
    """

    def __init__(self, given: Comparison, model: str, data: TaskData):
        base, self.into, self.device = _put_on(model, given), given.into, torch.device(default_device())
        self.predictor = load_predictor(model, data.recipe, str(self.device), given.max_new_tokens, base)
        check_questions(self.predictor.preparation, data)
        self.maker = made_by(model, self.predictor, base)

    def answers(
        self, data: TaskData, folder: str, batch_size: int, variant: Variant | None = None
    ) -> dict[str, str]:
        """Return id → answer, from their file as far as they are there.

        The file is named after the model's content and the data's, so that a changed model, or a changed
        recipe, is answered anew, and the base is not.

        Args:
            data: the examples.
            folder: where the answers are kept.
            batch_size: examples per forward pass.
            variant: of answers that measure the noise, what is different.
        """
        maker, dtype = self.maker, variant and variant.dtype
        if variant:
            maker = maker | {"noise": f"batches of {batch_size}{f', {dtype}' if dtype else ''}"}
        path = self.into / folder / f"{file_name(data.recipe.name)}-{_key(maker, data)}.jsonl"
        return answer(self.predictor, data, path, batch_size, self.device, maker, dtype)


def _key(maker: Mapping[str, Any], data: TaskData) -> str:
    """Return a name for what answers depend on."""
    content = [maker, data.recipe.name, data.recipe.version, data.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _put_on(model: str, given: Comparison) -> str | None:
    """Return what an adapter is put on: a base that is a whole model; what the adapter names when None."""
    tuned, base = ((Path(name) / ADAPTER).is_file() for name in (given.tuned, given.base))
    return given.base if model == given.tuned and tuned and not base else None


def append_step_summary(text: str) -> None:
    """Append Markdown to the summary of a GitHub Actions step, where this is one."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
