"""Log messages of KeepLoRA on its sketches: how near they are to the optimum, and where they fall short."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llava_keeplora.methods.base import TaskContext

logger = logging.getLogger(__name__)


def log_gradient_estimates(task: str, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Log how near the sketched layers' A are to the best rank-r subspaces."""
    sketched = {name: record for name, record in numbers.items() if "passes" in record}
    for name, record in sketched.items():
        logger.debug(
            "%s, layer %s: A holds about %.3f, at least %.3f, of the best rank-r energy after %d passes",
            task,
            name,
            record["of_optimum"],
            record["at_least"],
            record["passes"],
        )
    if sketched:
        worst = min(sketched, key=lambda name: sketched[name]["of_optimum"])
        logger.info(
            "%s: A of %d layers comes from sketched gradients, in up to %d passes over the data; it holds an "
            "estimated %.3f of the best rank-r energy in the worst layer, %s, of which %.3f is proven",
            task,
            len(sketched),
            max(record["passes"] for record in sketched.values()),
            sketched[worst]["of_optimum"],
            worst,
            sketched[worst]["at_least"],
        )


def warn_unreached_energy(ctx: TaskContext, held: Mapping[str, float]) -> None:
    """Warn of layers whose sketch is certain of less energy than ε_f, even after the second pass.

    Args:
        ctx: the task's context.
        held: layer name → the fraction of energy that is certainly protected.
    """
    if held:
        worst = min(held, key=held.get)
        logger.warning(
            "%s: the sketched features of %d layers don't reach energy_feature; %s certainly protects only "
            "%.3f of %s. Raise memory.statistics_gb, or lower energy_feature",
            ctx.name,
            len(held),
            worst,
            held[worst],
            ctx.layers[worst].energy_feature,
        )
