"""How much of a task's data a pass reads if its fraction is `auto`: as much as an estimate asks for.

The data are read in a random order, so that what has been read is a sample of all of it. The first half of
what has been read gives a result (A, or M_t's new directions), whose quality is measured on everything that
has been read. It loses what it loses on the other half alone, which it has not seen; so the result of both
halves is expected to lose at most as much on the part that has not been read:

    lost on all data <= 2 (1 - share) * lost on what was read, by the result of its first half.

To leading order in 1/n the loss of A is half of that. Far from that order (many classes, a flat spectrum) a
loss falls more slowly than 1/n, and the factor 2 is needed. Twice as much is read each time until that is
small enough, or until the pass would cost too much beside the task's training.

An estimate from a random sample cannot see what is too rare to be in the sample: of directions that one
example in n uses, a sample of fewer than n examples may know nothing, and neither does the estimate. How the
data are sorted does not matter.

Legend: n examples read, A (in, r), M_t feature directions of a task, ε_f the energy that they must hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.steps import Budget
from llava_keeplora.subspace import FeatureDirections, HeldOut

logger = logging.getLogger(__name__)

AUTO = "auto"
#: Kind of a pass → the setting of the share that it reads.
FRACTIONS = {"gradient": "gradient_fraction", "feature": "feature_fraction"}
#: The part of the energy that A of all data holds, over all layers, that A may be expected to lose.
GRADIENT_LOSS = 0.01
#: The most that a layer's M_t may be expected to hold less than ε_f of the energy of all features.
FEATURE_LOSS = 0.005
#: The most examples that a pass reads, as a fraction of those that training sees (each as often as it is
#: seen). An example takes about 0.8 of its time in training in a pass for gradients, 0.4 in one for features.
GRADIENT_LIMIT, FEATURE_LIMIT = 1 / 8, 1 / 4
#: Fewer examples are not worth an estimate.
LEAST = 64
#: The first reading is this fraction of the most that may be read, or more: each one costs a decomposition.
FIRST = 1 / 8


@dataclass(frozen=True)
class Stretch:
    """The examples from `start` to `stop` of a task's data in a random order, the same in every process.

    Args:
        seed: of the order.
        start, stop: places in the order.
    """

    seed: int
    start: int
    stop: int

    def of(self, count: int) -> list[int]:
        """Return the indices of the examples, out of `count`, in ascending order."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return order[self.start : self.stop].sort().values.tolist()

    @property
    def whole(self) -> Stretch:
        """The stretch from the beginning of the order."""
        return Stretch(self.seed, 0, self.stop)


Share = float | Stretch


def check_fraction(name: str, value: float | str) -> None:
    """Check that a fraction of the data is `auto` or in (0, 1].

    Raises:
        MethodError: naming the setting.
    """
    if isinstance(value, str) and value != AUTO:
        raise MethodError(f"{name} must be {AUTO} or in (0, 1] (got '{value}')", nearest(value, [AUTO]))
    if not isinstance(value, str) and not 0.0 < value <= 1.0:
        raise MethodError(f"{name} must be in (0, 1] (got {value})", "set it to 1.0 for all of the data")


def reading_sizes(examples: int, most: float) -> list[int]:
    """Return how many examples have been read after each reading, if no estimate ends it before.

    Args:
        examples: number of the task's.
        most: the most that a pass may read; at least `LEAST` are allowed.
    """
    last = min(examples, max(LEAST, int(most)))
    if last == examples <= LEAST:
        return [last]
    sizes = [math.ceil(last * FIRST * 2**step) for step in range(round(math.log2(1 / FIRST)) + 1)]
    return [size for size in sizes if size >= min(LEAST, sizes[-2])]


def most_read(method: Any, budgets: Sequence[Budget]) -> str:
    """Return a sentence on the most that the passes of a method read in a run, for its plan.

    Args:
        method: the method; without fractions that are `auto`, the sentence is empty.
        budgets: what each task's training takes.
    """
    limits = {"gradient": GRADIENT_LIMIT, "feature": FEATURE_LIMIT}
    most = {
        kind: sum(reading_sizes(b.examples, limit * b.seen)[-1] for b in budgets if b.examples)
        for kind, limit in limits.items()
        if getattr(method, FRACTIONS[kind], None) == AUTO
    }
    if not most:
        return ""
    seen = sum(budget.seen for budget in budgets)
    return (
        " and ".join(f"each {kind} pass reads at most {examples:,}" for kind, examples in most.items())
        + f" examples in all tasks, chosen from the data ({seen:,} in training)"
    )


def expected_loss(lost: float, read: int, examples: int) -> float:
    """Return what the result of `read` examples is expected to lose on all of them, at most.

    Args:
        lost: what the result of the first half of them loses on all that were read.
        read: number of examples read.
        examples: number of all examples.
    """
    return 2 * max(lost, 0.0) * (1 - read / examples)  # NaN stays NaN, which is below no limit.


class Reader:
    """The readings of one pass, and the record of where they ended.

    Args:
        ctx: the task's context.
        kind: `gradient` or `feature`.
        limit: the most examples, as a fraction of those that training sees.
    """

    def __init__(self, ctx: TaskContext, kind: str, limit: float):
        self.ctx, self.kind = ctx, kind
        budget = ctx.budgets[ctx.index - 1] if ctx.budgets else None
        #: Number of the task's examples; 0 where the pass cannot choose among them, and reads all.
        self.examples = budget.examples if budget else 0
        self.sizes = reading_sizes(self.examples, limit * budget.seen) if budget and self.examples else []
        self.ended = False

    def stretches(self) -> Iterator[Share]:
        """Yield what is to be read next, until `enough`; the statistics of one pass continue in the next."""
        if not self.examples:
            yield 1.0
            return
        start = 0
        for stop in self.sizes:
            yield Stretch(self.ctx.seed, start, stop)
            if self.ended:
                return
            start = stop

    def enough(self, share: Stretch, lost: float | None, allowed: float) -> bool:
        """Record a reading's estimate, and return whether it ends the pass; the first process decides.

        Args:
            share: what was read last.
            lost: what the first half's result loses on all that was read; None for the first reading, which
                has none.
            allowed: the expected loss that suffices.
        """
        everything = share.stop == self.examples
        # Rounding differs between processes on different processors, and all must read the same.
        lost = all_gather_object(lost)[0]
        loss = 0.0 if everything else None if lost is None else expected_loss(lost, share.stop, self.examples)
        self.ended = loss is not None and loss <= allowed
        self.ctx.report[f"{self.kind}_share"] = {
            "share": share.stop / self.examples,
            "examples": share.stop,
            "expected_loss": loss,
            "allowed_loss": allowed,
            "ended_by": "all data" if everything else "estimate" if self.ended else "cost",
        }
        return self.ended

    def log(self) -> None:
        """Log how much was read, and what the estimate says."""
        record = self.ctx.report[f"{self.kind}_share"]
        loss = record["expected_loss"]
        logger.info(
            "%s: the %s pass read %.3f of the data%s; estimated to lose %s of the energy of all",
            self.ctx.name,
            self.kind,
            record["share"],
            f", the most by its cost (`{FRACTIONS[self.kind]}: 1.0` reads all)"
            * (record["ended_by"] == "cost"),
            "an unknown part" if loss is None else f"about {loss:.4f}",
        )


def read_gradients(
    ctx: TaskContext,
    statistics: Mapping[str, Any],
    ranks: Mapping[str, int],
    fraction: float | str,
    naming: Callable[[Layer], AbstractContextManager],
) -> Share:
    """Run the first gradient pass over a fraction of the data, or over as much as it takes.

    Args:
        ctx: the task's context; its report gets a record if the fraction is `auto`.
        statistics: layer name → statistic, see `gradient_statistic`.
        ranks: layer name → r.
        fraction: fraction of the data, or `auto`.
        naming: returns a context that adds the layer's name to errors raised inside it.

    Returns:
        what was read, for further passes.
    """
    if not isinstance(fraction, str):
        ctx.gradients(fraction, statistics)
        return fraction
    sketched = any(statistic.further_passes for statistic in statistics.values())
    reader = Reader(ctx, "gradient", GRADIENT_LIMIT / (2 if sketched else 1))
    before: dict[str, HeldOut] = {}
    for share in reader.stretches():
        ctx.gradients(share, statistics)
        if isinstance(share, float):
            return share
        seen: dict[str, HeldOut] = {}
        for name, statistic in statistics.items() if share.stop < reader.examples else ():
            with naming(ctx.layers[name]):
                seen[name] = statistic.held_out(ranks[name])
        reader.enough(share, _lost_energy(seen, before), GRADIENT_LOSS)
        before = seen
    reader.log()
    return share.whole


def _lost_energy(seen: Mapping[str, HeldOut], before: Mapping[str, HeldOut]) -> float | None:
    """Return the part of the energy of what was read that its own A hold and the first half's do not."""
    if not before or not seen:
        return None
    most = sum(held_out.energy(held_out.A) for held_out in seen.values())
    half = sum(held_out.energy(before[name].A) for name, held_out in seen.items())
    return 1.0 - half / most if most > 0.0 else 0.0


def read_features(
    ctx: TaskContext,
    make: Callable[[list[list[str]]], Mapping[str, Any]],
    extend: Callable[[str, Any], FeatureDirections],
    bases: Mapping[str, Tensor],
    fraction: float | str,
) -> tuple[Mapping[str, Any], Share]:
    """Run the feature pass over a fraction of the data, or over as much as it takes.

    Args:
        ctx: the task's context; its report gets a record if the fraction is `auto`.
        make: makes the statistics, see `TaskContext.features`.
        extend: (layer name, statistic) → what the features add to the layer's basis.
        bases: layer name → (in, k).
        fraction: fraction of the data, or `auto`.

    Returns:
        layer name → statistic, and what was read, for further passes.
    """
    if not isinstance(fraction, str):
        return ctx.features(make, fraction), fraction
    reader = Reader(ctx, "feature", FEATURE_LIMIT)
    made: dict[str, Any] = {}
    reached: dict[str, Any] = {}
    before: dict[str, FeatureDirections] = {}

    def continued(groups: list[list[str]]) -> Mapping[str, Any]:
        if not made:
            made.update(make(groups))
        return made

    for share in reader.stretches():
        reached |= ctx.features(continued, share)
        if isinstance(share, float):
            return reached, share
        # A layer that only the last reading reached has no estimate, so more is read.
        lost = (
            max(
                _deficit(before[name], statistic, bases[name], ctx.layers[name].energy_feature)
                for name, statistic in reached.items()
            )
            if before and before.keys() == reached.keys()
            else None
        )
        if not reader.enough(share, lost, FEATURE_LOSS) and share.stop < reader.sizes[-1]:
            before = {name: extend(name, statistic) for name, statistic in reached.items()}
    reader.log()
    return reached, share.whole


def _deficit(before: FeatureDirections, statistic: Any, basis: Tensor, energy: float) -> float:
    """Return how much less than wanted the first half's directions hold of the energy of all that was read.

    Wanted is ε_f, or what they hold of their own half, where a limit keeps them below it.
    """
    return min(energy, before.energy_after) - statistic.held(basis, before.new)
