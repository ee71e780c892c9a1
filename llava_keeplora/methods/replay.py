"""Replay: a few examples of every earlier task are trained on again with each later one.

Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning",
https://arxiv.org/abs/1902.10486 (experience replay). Rows of the same kind: MCITlib and Continual-NExT;
`general` is what training tools advise, to mix general data into a fine-tuning.

After each task some of its training examples are drawn, by the run's seed and the task, and kept: `share` of
them, or `examples`. Their ids and the bytes that they take are in the task's `consolidated.json`. Every
optimiser step of a later task has, in addition to the task's own examples, `ratio` times as many of those
kept of all earlier tasks; of data that a recipe names under `general`, every step of every task has
`general_ratio` times as many. Each pool is drawn pass after pass, each time in a new order. The loss of a
step is the mean over all its examples (over their answers' tokens, for models that write answers), each with
the class prompts and the prompt of its own task. The adapters are those of sequential LoRA.

The number of steps is that of sequential LoRA, and while nothing is added, as in the first task, so is the
update.

Differences:

- From the paper: a memory per task instead of one of fixed size for all, drawn once and at random after the
  task (there from a stream; rings and reservoirs). Adapters instead of the whole model, and any number of
  passes over a task.
- A step's examples of one task are a batch of their own, because class prompts belong to a task; they are
  weighted as in one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, MethodInfo, TaskContext
from llava_keeplora.methods.info import check_effect
from llava_keeplora.methods.kept_examples import KeptExamples
from llava_keeplora.methods.mixture import Mixture, add_examples
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.steps import Budget

#: Name of the only tensor of a task's state.
KEPT = "replay"


class Replay(SequentialLora):
    """Replay of kept examples as `methods/replay.py` describes it."""

    info = MethodInfo(
        "replay",
        "On Tiny Episodic Memories in Continual Learning",
        "https://arxiv.org/abs/1902.10486",
        kept="a share of its training examples",
    )
    mixes = True
    adopts = False

    @dataclass(frozen=True)
    class Options:
        """Settings of replay.

        Args:
            share: share of a task's training examples that is kept, at least one.
            examples: number of examples that are kept of a task instead, at most all.
            ratio: examples of earlier tasks in every step, per example of the task.
            general: a recipe, by name or file, whose training data are mixed in too, from the first task on.
            general_examples: most examples of it, drawn by the seed; all when None.
            general_ratio: its examples in every step, per example of the task.
        """

        share: float = 0.01
        examples: int | None = None
        ratio: float = 1.0
        general: str | None = None
        general_examples: int | None = None
        general_ratio: float = 1.0

        def __post_init__(self) -> None:
            if not 0.0 < self.share <= 1.0:
                raise MethodError(
                    f"share must be above 0 and at most 1 (got {self.share})", "set it to 0.01, for instance"
                )
            for name in ("examples", "general_examples"):
                if (most := getattr(self, name)) is not None and most < 1:
                    raise MethodError(
                        f"{name} must be at least 1 (got {most})", "leave it out for any number"
                    )
            for name in ("ratio", "general_ratio"):
                if not 0.0 <= getattr(self, name) < float("inf"):
                    raise MethodError(
                        f"{name} must not be negative, and must be finite (got {getattr(self, name)})",
                        "set it to 1, for as many as the task's own",
                    )
            if self.general is not None and not self.general.strip():
                raise MethodError("general is empty", "name a recipe, or leave it out for no general data")
            check_effect(self, ("share",), "examples", None)
            check_effect(self, ("general_examples", "general_ratio"), "general")

    def __init__(self, options: Replay.Options):
        super().__init__(options)
        self._kept = KeptExamples(KEPT)

    def general_data_spec(self) -> str | None:
        """Return the recipe of the general data."""
        return self.options.general

    def general_examples(self, available: int) -> int:
        """Return at most `general_examples` of the options."""
        return min(available, self.options.general_examples or available)

    def budget(self, index: int, budgets: Sequence[Budget]) -> Budget:
        """Return the task's own steps, with the examples that are added to each."""
        own, options = budgets[index - 1], self.options
        ratios = (options.ratio * (index > 1), options.general_ratio * (options.general is not None))
        batch, total = (n + sum(round(n * ratio) for ratio in ratios) for n in (own.batch, own.seen))
        return replace(own, batch=batch, total=total)

    def mixture(self, ctx: TaskContext) -> Mixture | None:
        """Return the task's examples with those that each step adds; None where none are added."""
        pools = [self._pool(ctx, source) for source in range(ctx.index)]
        earlier = [pair for pool in pools[1:] for pair in pool]
        added = [(earlier, self.options.ratio), (pools[0], self.options.general_ratio)]
        if not any(pool and ratio for pool, ratio in added):
            return None
        return add_examples(ctx.index, ctx.budgets[ctx.index - 1], added, ctx.seed)

    def _pool(self, ctx: TaskContext, source: int) -> list[tuple[int, int]]:
        """Return (source, example), as in `Mixture`, of what is kept of a task; 0 is the general data."""
        kept = set(self._kept.rows(ctx, source))
        if not kept:
            return []
        assert ctx.learned_rows is not None
        return [(source, example) for example, row in enumerate(ctx.learned_rows(source)) if row in kept]

    def after_task(self, ctx: TaskContext) -> None:
        """Draw the examples that are kept of the task; with `ctx.index` 0, of the general data."""
        if ctx.index == 0 and self.options.general is None:
            self._kept.keep(ctx, 0)
            return
        assert ctx.data is not None
        available = len(ctx.data(ctx.index))
        self._kept.keep(ctx, self._count(available) if ctx.index else self.general_examples(available))

    def _count(self, available: int) -> int:
        """Return how many of a task's examples are kept."""
        share, number = self.options.share, self.options.examples
        return min(max(1, round(share * available)) if number is None else number, available)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the numbers of the examples that are kept of the last task."""
        return self._kept.state_dict()

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take over what is kept of the general data and of every task."""
        self._kept.load(states)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the numbers of the examples that are kept of a task."""
        return self._kept.holds(ctx.index)
