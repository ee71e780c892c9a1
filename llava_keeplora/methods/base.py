"""The interface that every method implements, with defaults for most of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from llava_keeplora.adapters import AdapterInit, BaseWeights, Delta, Deltas
from llava_keeplora.methods.answer_context import AnswerContext
from llava_keeplora.methods.holding import Holding
from llava_keeplora.methods.info import MethodInfo, check_finite
from llava_keeplora.methods.layer import Layer
from llava_keeplora.methods.mixture import Mixture
from llava_keeplora.methods.reference import Reference
from llava_keeplora.methods.subspace_plan import SubspacePlan
from llava_keeplora.steps import Budget
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import TaskData

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example


@dataclass
class TaskContext:
    """Everything that a method can use in one stage of a task.

    Args:
        index: 1 for the first task; 0 for the base before any task.
        name: the task's name.
        layers: name → adapted layer.
        gradients: `gradients(fraction, statistics, per_example=False)` runs the gradient pass over a fraction
            of the data (or a `shares.Stretch`), of the mean loss or of each example's, and returns their
            number.
        features: `features(make, fraction=1.0)` runs the feature pass over a fraction of the data and returns
            layer name → statistic; `make` is called with the layers' names, grouped by the tensor that they
            read, and returns the statistics.
        seed: seed of this task and stage, the same in every process.
        statistics_bytes: memory limit for the statistics of one pass, in bytes of device memory.
        batches: returns an iterator over this process's batches of the task's training data, in order.
        model: the model in its state at this stage.
        examples: returns an iterator over this process's share of the task's training examples, in batches.
        predictor: returns the model's own predictor of the task's training examples.
        task: returns the model with the task's loss, a `llava_keeplora.models.TaskModel`.
        pretrained: returns a frozen copy of the model from before the first task.
        deltas: returns the deltas that the model carries at this stage, in order: those of the earlier tasks,
            and in `after_task` the finished task's.
        weights: returns the weights of every layer that the run changes; `apply` puts other deltas on them.
        report: the method's own numbers, which are written into the run folder.
        base: the report of the base; empty for the base itself.
        tasks: number of tasks of the run.
        choose: part → the choice of its ε_w from the data, with the key `energy`.
        forward: the model that is trained, in its precision, on a batch; only in `before_steps` and `loss`.
            With gradients, the batch's examples count as trained on; without, as another forward pass.
        outputs: `outputs(compute)` returns what `compute` gives for the task's training data, batch by batch
            in order, (examples, ...) in fp32 on the host; it returns a row per example of a batch.
        rows: the indices of a batch's examples in these data, (batch,); only in `loss`; None for a `mixture`.
        repeats: whether training sees some of the task's examples twice, and not cropped anew each time.
        own_answers: returns the task's training questions with the model's answers from before it, `Inputs`.
        data: returns the training data of a task of the run, counted from 1; for 0 those of
            `general_data_spec`.
        learned_rows: returns, for each training example of a task as the model learns it (a `Mixture` counts
            these), its row in `data`: an image with several captions is learned with each.
        budgets: what each task's training takes.
        fit: `fit(inits, data, mixture, training)` trains adapters on the model as it is at this stage, on any
            task's data, and returns layer name → their update; only in `after_task`. See
            `Method.further_budget`.
        passes: kind → examples that went through the model in this stage besides the training's own batches;
            what goes around these hooks is added by the method.
    """

    index: int
    name: str
    layers: dict[str, Layer]
    gradients: Callable[..., int]
    features: Callable[..., Mapping[str, Any]]
    seed: int
    statistics_bytes: int
    batches: Callable[[], Iterator[dict[str, Tensor]]] = lambda: iter(())
    model: nn.Module | None = None
    examples: Callable[[], Iterator[list[Example]]] = lambda: iter(())
    predictor: Callable[[], Predictor] | None = None
    task: Callable[[], Any] | None = None
    pretrained: Callable[[], nn.Module] | None = None
    deltas: Callable[[], list[Deltas]] = list
    weights: Callable[[], BaseWeights] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    tasks: int = 0
    choose: Callable[[str], dict[str, Any]] | None = None
    forward: Callable[..., Any] | None = None
    outputs: Callable[[Callable[[Mapping[str, Tensor]], Tensor]], Tensor] | None = None
    rows: Tensor | None = None
    repeats: bool = False
    own_answers: Callable[[], Any] | None = None
    data: Callable[[int], TaskData] | None = None
    learned_rows: Callable[[int], Sequence[int]] | None = None
    budgets: Sequence[Budget] = ()
    fit: Callable[..., dict[str, Delta]] | None = None
    passes: Counter[str] = field(default_factory=Counter)


class Method:
    """Base class of continual-learning methods: hooks that run before, during and after a task.

    The run folder stores for every task the deltas, the `extra_state` of its training and the `state_dict` of
    its `after_task`, each once; `load_state_dicts` gets those of all tasks back, merged per task.
    """

    info: MethodInfo
    #: Whether the method trains at all; one that does not has only the zero-shot row.
    trainable = True
    #: Stage → its cost in addition to training, in forward passes of the task's data, for the time estimate.
    stage_cost: dict[str, float] = {}
    #: Dropout on the adapters' input while training.
    dropout: float = 0.0
    #: Whether `after_task` on the base depends only on the model, the method's settings and the set of tasks,
    #: not on their order or the seed: runs that share a base cache then compute it once.
    base_is_cacheable = False
    #: Whether ZeRO-3 may shard trained parameters; False if they are read outside of their layers' forward.
    supports_zero3 = True
    #: Why not, as the predicate of a sentence.
    zero3_conflict = "reads trained parameters outside of their layers, where they are sharded"
    #: Whether `create_optimizer` returns an optimiser of the method's own, which is AdamW but for its steps;
    #: DeepSpeed, which splits parameters, and other optimisers are then refused.
    own_optimizer = False
    #: The option, and its value, with which such a method has the Trainer's optimiser and takes ZeRO-1 and 2.
    default_optimizer: tuple[str, str] | None = None
    #: Whether it runs in one process only.
    one_process = False
    #: Whether the gradient pass weighs all examples equally, instead of as the loss does.
    counts_examples = False
    #: Whether the feature pass takes the prompts at every position of the text encoder, padding included.
    every_position = False
    #: Whether training compares image features with those of the task's start.
    keeps_features = False
    #: Whether it puts LoRA adapters on the layers that a run's parts name.
    uses_lora = True
    #: Whether it trains the whole model instead, every parameter but those of the root module; see
    #: `find_changed`.
    full_finetuning = False
    #: Whether a task is trained on the model after the earlier ones; False if each is trained from the
    #: untouched base.
    cumulative = True
    #: Whether every task's update on the base is a model of its own, so that `export --as set --each task`
    #: holds all that was learned, although nothing merges.
    separate_tasks = False
    #: Whether it is a bound to read other methods against, and not one model that learns task after task: its
    #: scores, taken as `scored` says, are the last row of the matrix, and a line in plots.
    bound = False
    #: Whether a task's update of an adapted layer is the change of its whole weight instead of an adapter.
    dense_updates = False
    #: Whether `after_task` takes features of all of a task's examples, and keeps one per class, or one.
    keeps_prototypes = False
    #: Whether the tasks' deltas and states are all that `predictor_of` needs, so that a finished run's files
    #: can answer also where nothing merges.
    answers_from_files = False
    #: Whether a task may train on other data than its own; see `mixture` and `further_budget`.
    mixes = False
    #: Whether an update may be trained elsewhere (`adopt`): deltas and `after_task` are all that is needed.
    adopts = False
    #: The reference data of `reference_data_spec`; None for methods that need none.
    reference: Reference | None = None

    @dataclass(frozen=True)
    class Options:
        """The method's own settings."""

    def __init__(self, options: Any):
        self.options = check_finite(options)

    @property
    def mergeable(self) -> bool:
        """Whether the result merges into the base's weights, with the method's settings."""
        return self.info.mergeable

    @property
    def plain_step(self) -> bool:
        """Whether a training step is that of the task's own loss, with nothing on the model but adapters."""
        return (type(self).loss, type(self).training_context) == (Method.loss, Method.training_context)

    @property
    def own_examples(self) -> bool:
        """Whether every step is on examples of its task alone, as many as the schedule says."""
        return not self.mixes and type(self).budget is Method.budget

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check the layers' settings before anything is computed; do nothing by default.

        Raises:
            MethodError: for settings that the method cannot follow.
        """

    def check_tasks(self, count: int) -> None:
        """Check the settings against a run's number of tasks when it is configured; do nothing by default.

        Raises:
            MethodError: for settings that the method cannot follow in one of the tasks.
        """

    def check_weights(self, layers: Mapping[str, Layer]) -> None:
        """Check the loaded weights of the base before any stage, in every process; do nothing by default.

        Raises:
            MethodError: for weights that the method cannot work on with the layers' settings.
        """

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Return the bytes that `memory.statistics_gb` must allow for a feature pass to run; 0 for any."""
        return 0

    def subspace_plan(self) -> SubspacePlan | None:
        """Return what the memory estimate needs to know; None for methods without protected subspaces."""
        return None

    def planned_adapters(self, layers: Mapping[str, Layer]) -> dict[str, AdapterInit] | None:
        """Return adapters of the shapes that a task will have, for the memory estimate.

        The estimate then also enters `training_context`, on a model without weights. None, the default, if
        `init_adapters` itself reads neither weights nor data, or if there is a `subspace_plan` and
        `training_context` adds nothing.
        """
        return None

    def planned_state(self, layers: Mapping[str, Layer], tasks: int) -> dict[str, Tensor] | None:
        """Return what the state holds after some tasks, for the estimate of `loss`; None for none."""
        return None

    def gradient_statistics(self, layers: Mapping[str, Layer]) -> Mapping[str, Any]:
        """Return the statistics of a `per_example` pass after a task, for the memory estimate."""
        return {}

    def reference_data_spec(self) -> tuple[str, str | None] | None:
        """Return a recipe of images, and a file of texts or None for the recipe's own texts.

        They are read into `reference` before anything is computed. None, the default, for no reference data.
        """

    def general_data_spec(self) -> str | None:
        """Return a recipe of a kind that the model learns, whose training split a `mixture` may name as 0.

        None, the default, for no such data.
        """

    def general_examples(self, available: int) -> int:
        """Return how many of the general data's examples are used; all by default."""
        return available

    def answer_bytes(self, dense: Mapping[str, int], delta: int, tasks: int) -> tuple[int, int]:
        """Return the host memory, in bytes, of `predictor_of` after some tasks: (kept on, in answers alone).

        Args:
            dense: module → bytes of the change of its whole weight.
            delta: bytes of one task's deltas.
            tasks: number of tasks learned.
        """
        return 0, 0

    def budget(self, index: int, budgets: Sequence[Budget]) -> Budget:
        """Return what the training of task `index` takes, given every task's alone; its own by default.

        Examples that `loss` learns from besides the step's batch are part of it; see `TaskContext.forward`.
        """
        return budgets[index - 1]

    def further_budget(self, index: int, budgets: Sequence[Budget]) -> Budget | None:
        """Return what `TaskContext.fit` takes after task `index`, given every task's training alone.

        None, the default, for no second training; only asked if the method `mixes`.
        """
        return None

    def mixture(self, ctx: TaskContext) -> Mixture | None:
        """Return the examples of each step of a task's training, of any tasks of the run.

        None, the default, for the task's own data alone. Only called if the method `mixes`, and for tasks
        whose `budget` has steps; the others train nothing. Every process must return the same.
        """

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return layer name → initial adapter, before a task.

        A layer that gets none is named, with the reason, in `ctx.report["left_out"]`.
        """
        raise NotImplementedError

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Enter a context for a task's training; `model` carries the adapters.

        Whatever a method adds to the model during training is built here, also when a killed run resumes.
        Parameters that it adds are trained, and are part of the checkpoints, as the adapters are.
        """
        yield

    def create_optimizer(self, ctx: TaskContext, default: Optimizer) -> Optimizer:
        """Return the optimiser of a task's training, if it is the method's `own_optimizer`.

        Called in `training_context`. A retraction or projection after a step belongs into its `step`. Its
        `state_dict` is part of the checkpoints and must have the form of torch's optimisers.

        Args:
            ctx: the task's context.
            default: the Trainer's AdamW, with its parameter groups and their learning rates and weight decay.
        """
        return default

    def before_steps(self, ctx: TaskContext) -> None:
        """Do something in every process before the first step, also of a resumed run; nothing by default."""

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss of one batch; the task's own by default."""
        return out["loss"]

    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """Do something after an optimiser step; nothing by default."""

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return a task's deltas, given those of its adapters; called in `training_context` after training.

        A module that is trained in full gets the change of its weights as delta, unless one is returned here.
        """
        return deltas

    def project(self, ctx: TaskContext, deltas: Deltas) -> Deltas:
        """Return an update that was trained elsewhere as the method takes it over; unchanged by default.

        Called instead of any training, on the model before the task, if the method `adopts`.
        """
        return deltas

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return what is added to the base's weights after some tasks; the sum of their deltas by default.

        Args:
            deltas: the deltas of each task, in order, on all layers or on some.
        """
        return list(deltas)

    def scored(self, index: int, tasks: int) -> Sequence[int]:
        """Return the tasks, counted from 1, that are scored after task `index` of a run; all by default."""
        return range(1, tasks + 1)

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training learned in addition to the deltas; called in `training_context`."""
        return {}

    def progress(self) -> dict[str, Tensor]:
        """Return tensors that a checkpoint needs in addition to the trained parameters.

        Called in `training_context`; when a killed run resumes, the tensors are overwritten in place.
        """
        return {}

    def weight_offset(self, inits: Mapping[str, AdapterInit]) -> dict[str, Delta]:
        """Return layer name → what is added to the weights while a task trains; nothing by default."""
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        """Update the method's state on the merged model; with `ctx.index` 0, on the base before any task."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the last `after_task` added to the method's state."""
        return {}

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Replace the method's state by that after all tasks so far.

        Args:
            states: for the base and each task, its `extra_state` and `state_dict` merged; the last task may
                not have been consolidated yet and then lacks the latter.
        """

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return the tensors that a task's `extra_state` and `state_dict` may hold; none by default.

        A state from elsewhere is checked against them.

        Args:
            ctx: the task's context; only its index, name, layers, and the model without weights are set.
            names: names of the tensors in the state, for methods whose names depend on the data.
        """
        return {}

    def predictor(self, predictor: Predictor, task: str) -> Predictor:
        """Return the predictor for the examples of a task; the model's own by default.

        Args:
            predictor: the model's own predictor for the task.
            task: the task's name.
        """
        return predictor

    def predictor_of(self, predictor: Predictor, ctx: AnswerContext) -> Predictor:
        """Return the predictor for the examples of a task, for methods that need more than its name."""
        return self.predictor(predictor, ctx.task)

    def capacity(self) -> dict[str, int]:
        """Return layer name → dimension of its protected subspace; empty for methods without one."""
        return {}
