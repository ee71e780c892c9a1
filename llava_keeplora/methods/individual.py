"""Every task learned alone from the untouched base: the bound of what a method can learn of each task.

Source: the row of the same name in MCITlib (Guo et al. 2025, https://arxiv.org/abs/2508.07307; code:
https://github.com/Ghy0501/MCITlib).

Task t is trained on the base as the first task of the method `of`, with its `settings`, and only task t is
scored with the update. So the row has one score per task, and no forgetting. The first task's update is that
of the method, number for number. `of` is sequential LoRA by default, with which every task's update is that
of `merge` with the rule `mean`; with `keeplora`, for instance, the row says what protecting the base costs.

Differences from MCITlib: its settings for this row were not found. The shipped configurations give the row
those of sequential LoRA, with the differences of `methods/seq_lora.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit, Delta, Deltas
from llava_keeplora.coerce import coerce_fields
from llava_keeplora.errors import MethodError, nearest
from llava_keeplora.methods.base import Holding, Layer, Method, MethodInfo, SubspacePlan, TaskContext
from llava_keeplora.registries import METHODS
from llava_keeplora.run_folder import CAPACITY, Stage

#: Attributes of a method that this row takes over, and hooks that need no task's number.
ATTRIBUTES = (
    "stage_cost",
    "dropout",
    "base_is_cacheable",
    "supports_zero3",
    "zero3_conflict",
    "one_process",
    "counts_examples",
    "every_position",
    "keeps_features",
    "check",
    "check_weights",
    "least_statistics",
    "planned_adapters",
    "weight_offset",
    "progress",
    "capacity",
)
#: Settings of a part, which are none of a method's own.
PART_KEYS = ("targets", "rank", "alpha", "energy_weight", "energy_feature", "learning_rate")
#: Hooks with which a method is more than an update of adapters, or more than one task's.
WHOLE = ("extra_state", "combine", "predictor", "mixture", "create_optimizer", "scored")


class Individual(Method):
    """Training of every task alone as `methods/individual.py` describes it."""

    info = MethodInfo(
        "individual",
        "MCITlib: Multimodal Continual Instruction Tuning Library and Benchmark (its row Individual)",
        "https://arxiv.org/abs/2508.07307",
        task_id_at_test=True,
        extra_parameters="an adapter per task",
        mergeable=False,
    )
    cumulative = False
    separate_tasks = True
    bound = True

    @dataclass(frozen=True)
    class Options:
        """Settings of the row; rank, alpha and thresholds are the parts'.

        Args:
            of: the method that learns each task as its first one: one whose tasks are updates of adapters.
            settings: that method's own settings.
        """

        of: str = "seq-lora"
        settings: dict[str, Any] = field(default_factory=dict)

        def __post_init__(self) -> None:
            make_inner(self.of, self.settings)

    def __init__(self, options: Individual.Options):
        super().__init__(options)
        self.inner = make_inner(options.of, options.settings)
        self._on_base = False
        for name in ATTRIBUTES:
            setattr(self, name, getattr(self.inner, name))
        # What the method does after a task is not done here; after the base it is.
        self.stage_cost = {
            stage: 0.0 if stage == Stage.CONSOLIDATED else cost for stage, cost in self.stage_cost.items()
        }
        #: KeepLoRA's, which a plan reads; features of finished tasks are not read here.
        self.gradient_fraction = getattr(self.inner, "gradient_fraction", None)

    @property
    def plain_step(self) -> bool:
        """Whether the method's is."""
        return self.inner.plain_step

    def subspace_plan(self) -> SubspacePlan | None:
        """Return the method's own, without the features of finished tasks.

        Sketches are not proposed for it, as `gradient` is no setting of this row, but one under `settings`.
        """
        plan = self.inner.subspace_plan()
        return plan and replace(plan, protects_features=False, may_sketch=False)

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return the adapters of the method's first task."""
        return self.inner.init_adapters(first_task(ctx))

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Enter that of the method's first task."""
        with self.inner.training_context(first_task(ctx), model):
            yield

    def before_steps(self, ctx: TaskContext) -> None:
        """Do what the method does in its first task."""
        self.inner.before_steps(first_task(ctx))

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the method's first task."""
        return self.inner.loss(first_task(ctx), batch, out)

    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Do what the method does in its first task."""
        self.inner.after_step(first_task(ctx), optimizer_step)

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return the deltas of the method's first task."""
        return self.inner.finalize_deltas(first_task(ctx), deltas)

    def after_task(self, ctx: TaskContext) -> None:
        """Let the method see the base; nothing is kept of a task."""
        self._on_base = ctx.index == 0
        if self._on_base:
            self.inner.after_task(ctx)
        elif CAPACITY in ctx.base:
            ctx.report[CAPACITY] = ctx.base[CAPACITY]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's state on the base, and nothing after a task."""
        return self.inner.state_dict() if self._on_base else {}

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Load the method's state on the base."""
        self.inner.load_state_dicts(states[:1])

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return what the method keeps of the base."""
        return {} if ctx.index else self.inner.holds(ctx, names)

    def planned_state(self, layers: Mapping[str, Layer], tasks: int) -> dict[str, Tensor] | None:
        """Return nothing where the method keeps something of a task, which is not kept here."""
        return self.inner.planned_state(layers, tasks) and {}

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return the last task's update alone."""
        return list(deltas[-1:])

    def scored(self, index: int, tasks: int) -> list[int]:
        """Return the task that was just learned."""
        return [index]


def first_task(ctx: TaskContext) -> TaskContext:
    """Return a task's context as that of a first task, before which nothing was learned; the report stays."""
    return replace(ctx, index=1, budgets=ctx.budgets[ctx.index - 1 : ctx.index], deltas=list)


def make_inner(name: str, settings: Mapping[str, Any]) -> Method:
    """Return the method that learns each task.

    Raises:
        MethodError: it is not built in, not one of updates of adapters, or does not have the settings.
        ConfigError: a setting has a value of a wrong type.
    """
    if METHODS.is_plugin(name):  # A state from elsewhere must not bring code along in a setting.
        raise MethodError(f"of is '{name}', which is no built-in method", nearest(name, list(METHODS)))
    cls = METHODS[name]
    info, own = cls.info, Method
    if (
        not (cls.trainable and cls.uses_lora and cls.cumulative and info.mergeable)
        or any((cls.mixes, cls.own_optimizer, cls.dense_updates, info.reference_data, info.model_types))
        or info.families != MethodInfo.families
        or any(getattr(cls, hook) is not getattr(own, hook) for hook in WHOLE)
    ):
        raise MethodError(
            f"of is '{name}', whose tasks are not updates of adapters alone, trained on their own data",
            "set it to seq-lora, keeplora or another such method",
        )
    known = {option.name for option in dataclasses.fields(cls.Options)}
    if unknown := next((key for key in settings if key not in known), None):
        raise MethodError(f"settings has '{unknown}', which '{name}' does not have", _cure(unknown, known))
    inner = cls(cls.Options(**coerce_fields(cls.Options, settings, "settings")))
    if not inner.mergeable:
        raise MethodError(
            f"of is '{name}' with rejection, which tells learned tasks apart from others, and each is alone",
            "leave rejection out of settings, and a preset that has it",
        )
    return inner


def _cure(unknown: str, known: Collection[str]) -> str:
    """Return what to do about a setting that the method does not have."""
    if unknown in PART_KEYS:
        return f"set {unknown} under the row's `parts`"
    return nearest(unknown, known)
