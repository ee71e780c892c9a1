"""ε_w of a part where it is `auto`, from the zero-shot score on what the run is trained on."""

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

#: Examples of each task's training split, evenly spaced, that are scored: never one of a test split.
EXAMPLES = 200


def cost(context: RunContext, layers: Mapping[str, Layer]) -> float:
    """What the choices take at most, in images through the model once."""
    parts = {layer.part for layer in layers.values() if "energy_weight" in layer.auto}
    return (
        len(parts)
        * (1 + len(CANDIDATES))
        * context.family.eval_cost
        * sum(min(EXAMPLES, len(task.train)) for task in context.tasks)
    )


def choose_energy_weight(context: RunContext, layers: Mapping[str, Layer], part: str) -> dict[str, Any]:
    """The choice of a part's ε_w on the base.

    Args:
        context: of the run; the model has the base's weights.
        layers: the adapted layers, of all parts.
        part: which of them.
    """
    own = {name: layer for name, layer in layers.items() if layer.part == part}
    rank = next(iter(own.values())).rank
    # Every announced task must find room to add a direction, and the last one to learn.
    room = rank + len(context.tasks) - 1
    # Kernels of several processes may round differently, and all of them must choose the same.
    choice = choose_energy(
        {name: layer.module for name, layer in own.items()},
        room,
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
    """Mean score over the run's tasks, on their training splits, of the model as it is."""
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for task in context.tasks:
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
