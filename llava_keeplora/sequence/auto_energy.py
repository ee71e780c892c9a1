"""Choice of a part's ε_w where it is `auto`, from the zero-shot score on the run's training data."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.analysis.choose_energy import CANDIDATES, choose_energy
from llava_keeplora.methods import Layer
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora_eval import predict_to_file, score

logger = logging.getLogger(__name__)

#: How many examples of each task's training split are scored, evenly spaced; test splits are never used.
EXAMPLES = 200


def cost(context: RunContext, layers: Mapping[str, Layer]) -> float:
    """Return an upper bound of what the choices cost, in forward passes of one image."""
    parts = {layer.part for layer in layers.values() if "energy_weight" in layer.auto}
    return (
        len(parts)
        * (1 + len(CANDIDATES))
        * context.family.eval_cost
        * sum(min(EXAMPLES, len(task.train)) for task in context.tasks)
    )


def choose_energy_weight(context: RunContext, layers: Mapping[str, Layer], part: str) -> dict[str, Any]:
    """Choose ε_w of a part on the base model.

    Args:
        context: the run's context; the model has the base's weights.
        layers: the adapted layers of all parts, by name.
        part: the part of the model to choose for.

    Returns:
        the record of the choice; see `llava_keeplora.analysis.choose_energy`.
    """
    part_layers = {name: layer for name, layer in layers.items() if layer.part == part}
    rank = next(iter(part_layers.values())).rank
    # Every task but the last adds at least one direction, and the last one still needs its full rank.
    min_free = rank + len(context.tasks) - 1
    # Kernels of several processes may round differently, but all of them must choose the same value.
    choice = choose_energy(
        {name: layer.module for name, layer in part_layers.items()},
        min_free,
        lambda: context.first_of(_zero_shot(context)),
    )
    logger.info(
        "energy_weight of %s: %g, at which its principal parts alone, %.0f %% of the directions, score %.1f "
        "of the model's %.1f %% before any task",
        part,
        choice.energy,
        100 * choice.directions,
        choice.score,
        choice.whole,
    )
    return choice.to_dict()


def _zero_shot(context: RunContext) -> float:
    """Return the mean score in percent of the model as it is, over the training splits of all tasks."""
    scores: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in (task for task in context.tasks if len(task.train)):
            count = min(EXAMPLES, len(task.train))
            data = task.train.take(i * len(task.train) // count for i in range(count))
            path = Path(folder) / f"{len(scores)}.jsonl"
            predictor = context.family.predictor(task.recipe, context.cache.split(task.train))
            predict_to_file(
                predictor,
                data,
                path,
                context.config.evaluation.batch_size,
                advance=lambda count: context.progress.advance(context.family.eval_cost * count),
            )
            scores.append(score(data, path).score)
    return statistics.fmean(scores)
