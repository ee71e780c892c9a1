"""A model after some tasks of a run, ready to answer."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_keeplora.config import AVERAGED
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.models import Prepared
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
        ConfigError: what the method learned does not merge into the weights.
    """
    learned = load_learned_run(run, label, at_task, base=base)
    if not learned.method.mergeable:
        raise ConfigError(
            f"what '{learned.label}' learned does not merge into the base's weights, so it answers within a "
            "run alone",
            f"read its answers in {learned.run / learned.label}/task-*/predictions",
        )
    family = learned.load()
    if not family.quantization:  # Quantised weights were loaded onto their device.
        family.model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictor = family.predictor(recipe, Prepared(family))
    settings = learned.config["methods"][learned.label]
    averaged = recipe.kind == "classification" and settings.get("test_prompts") == AVERAGED
    return predictor.with_test_prompts() if averaged else predictor  # type: ignore[attr-defined]  # CLIP's
