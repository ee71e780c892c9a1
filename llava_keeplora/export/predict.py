"""A model after some tasks of a run, ready to answer."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_keeplora.adapters import BaseWeights
from llava_keeplora.config import AVERAGED
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.loaded_run import LearnedRun, load_learned_run
from llava_keeplora.methods import AnswerContext
from llava_keeplora.models import Family, Prepared
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Recipe


def load_run_predictor(
    run: str | Path,
    recipe: Recipe,
    label: str | None = None,
    at_task: int | None = None,
    base: str | None = None,
) -> Predictor:
    """Load a run's model with what it learned, and return what answers a task with it.

    Args:
        run: the run folder.
        recipe: the task, with its classes.
        label: the method's label; None if the run has one method.
        at_task: the last learned task, counted from 1; the last finished one when None.
        base: see `load_learned_run`.

    Raises:
        RunError: no task is finished, or a file is damaged.
        ConfigError: what the method learned does not merge into the weights, and takes more than its files to
            answer with.
    """
    learned = load_learned_run(run, label, at_task, base=base)
    if not (learned.method.mergeable or learned.method.answers_from_files):
        raise ConfigError(
            f"what '{learned.label}' learned does not merge into the base's weights, so it answers within a "
            "run alone",
            f"read its answers in {learned.run / learned.label}/task-*/predictions",
        )
    family = learned.load(deltas=None if learned.method.mergeable else [])
    if not family.quantization:  # Quantised weights were loaded onto their device.
        family.model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictor = family.predictor(recipe, Prepared(family))
    settings = learned.config["methods"][learned.label]
    if recipe.kind == "classification" and settings.get("test_prompts") == AVERAGED:
        predictor = predictor.with_test_prompts()  # type: ignore[attr-defined]  # CLIP's
    return predictor if learned.method.mergeable else _picking(learned, family, predictor, recipe)


def _picking(learned: LearnedRun, family: Family, predictor: Predictor, recipe: Recipe) -> Predictor:
    """Return a method's own predictor, which puts on the base's weights what answers an example."""
    names = dict.fromkeys(name for task in learned.deltas for name in task)
    weights = BaseWeights({name: family.model.get_submodule(name) for name in names})
    weights.apply(learned.method.combine(learned.deltas))
    learned.method.load_state_dicts(learned.states())
    known = learned.recipes[: len(learned.deltas)]
    return learned.method.predictor_of(
        predictor,
        AnswerContext(
            recipe.name,
            [task.name for task in known],
            lambda: list(learned.deltas),
            family.model,
            weights,
            recipe,
            known,
            lambda tokens: family.predictor(recipe, Prepared(family), tokens),
        ),
    )
