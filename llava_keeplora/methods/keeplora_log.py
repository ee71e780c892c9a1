"""Records and log messages of KeepLoRA's directions: their energies, and the quality of sketches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llava_keeplora.methods.base import TaskContext
from llava_keeplora.subspace import (
    FeatureDirections,
    ResidualDirections,
    SketchedDirections,
    SketchedFeatureDirections,
)

logger = logging.getLogger(__name__)


def gradient_record(directions: ResidualDirections) -> dict[str, Any]:
    """Return the numbers of a layer's initial directions for the report."""
    record = {
        "rank": directions.A.shape[1],
        "residual_energy": directions.residual_energy,
        "captured": directions.captured,
    }
    if isinstance(directions, SketchedDirections):
        keys = ("captured_error", "of_optimum", "at_least", "residual_bounds", "passes")
        record |= {key: getattr(directions, key) for key in keys}
    return record


def feature_record(directions: FeatureDirections, passes: int) -> dict[str, Any]:
    """Return the numbers of a layer's feature directions, from so many passes, for the report."""
    record = {
        "before": directions.energy_before,
        "after": directions.energy_after,
        "new": directions.rank,
    }
    if isinstance(directions, SketchedFeatureDirections):
        record |= {
            "error": directions.energy_error,
            "missed": directions.missed,
            "fewest": directions.fewest,
            "reached": directions.reached,
            "passes": passes,
        }
    return record


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


def warn_unreached_energy(ctx: TaskContext, held: Mapping[str, float], rule: str) -> None:
    """Warn of layers whose sketch is certain of fewer directions than asked for, even after the second pass.

    Args:
        ctx: the task's context.
        held: layer name → the fraction of energy that is certainly protected.
        rule: the setting `feature_rule`.
    """
    if not held:
        return
    worst = min(held, key=held.get)
    if rule == "energy":
        logger.warning(
            "%s: the sketched features of %d layers don't reach energy_feature; %s certainly protects only "
            "%.3f of %s. Raise memory.statistics_gb, or lower energy_feature",
            ctx.name,
            len(held),
            worst,
            held[worst],
            ctx.layers[worst].energy_feature,
        )
    else:
        logger.warning(
            "%s: the sketched features of %d layers may have more directions that feature_rule: %s takes; "
            "%s certainly protects %.3f of their energy. Raise memory.statistics_gb",
            ctx.name,
            len(held),
            rule,
            worst,
            held[worst],
        )
