"""What KeepLoRA logs of its sketches: how near they are to the optimum and where they fall short."""

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
            "%s, layer %s: A holds %.3f of the optimum, at least %.3f, after %d passes",
            task,
            name,
            record["of_optimum"],
            record["at_least"],
            record["passes"],
        )
    if sketched:
        worst = min(sketched, key=lambda name: sketched[name]["of_optimum"])
        logger.info(
            "%s: A of %d layers from sketched gradients, in up to %d passes over the data; "
            "an estimated %.3f of the best rank-r energy in %s, the worst, of which %.3f is proven",
            task,
            len(sketched),
            max(record["passes"] for record in sketched.values()),
            sketched[worst]["of_optimum"],
            worst,
            sketched[worst]["at_least"],
        )


def warn_unreached_energy(ctx: TaskContext, held: Mapping[str, float]) -> None:
    """Warn of layers whose sketch, in two passes, was sure of less energy than ε_f asks for."""
    if held:
        worst = min(held, key=held.get)
        logger.warning(
            "%s: the sketched features of %d layers don't reach energy_feature; %s protects %.3f of %s for "
            "sure. Raise memory.statistics_gb, or lower energy_feature",
            ctx.name,
            len(held),
            worst,
            held[worst],
            ctx.layers[worst].energy_feature,
        )
