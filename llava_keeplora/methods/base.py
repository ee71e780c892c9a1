"""The interface that every method implements, with defaults for all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit, Delta, Deltas
from llava_keeplora.methods.reference import Reference
from llava_keeplora.run_folder import Capacity
from llava_keeplora_eval.predictors import Predictor


@dataclass(frozen=True)
class MethodInfo:
    """What a user can list about a method.

    Args:
        name: as in a configuration.
        title: of the paper or idea.
        url: of the source.
        reference_data: whether it needs data beside the task's.
        task_id_at_test: whether it must be told the task at test time.
        inference_cost: extra cost at inference.
        extra_parameters: what the model has at inference beside the base's own parameters.
        mergeable: whether its result merges into the base's weights.
        kept: what is kept for later tasks beside what the finished ones changed.
        trained: what a task trains.
        families: of models that it runs on.
        model_types: those types of them, by transformers' names, that it runs on; all of them when empty.
    """

    name: str
    title: str
    url: str = ""
    reference_data: bool = False
    task_id_at_test: bool = False
    inference_cost: str = "none"
    extra_parameters: str = "none"
    mergeable: bool = True
    kept: str = "nothing"
    trained: str = "A and B"
    families: tuple[str, ...] = ("clip", "llava")
    model_types: tuple[str, ...] = ()

    @property
    def needs(self) -> str:
        """In words, what it runs on and asks for."""
        asked = ["reference data"] * self.reference_data + ["the task at test time"] * self.task_id_at_test
        cost = [] if self.inference_cost == "none" else [f"extra at test: {self.inference_cost}"]
        return "; ".join(
            [
                " and ".join(self.families),
                *(f"needs {one}" for one in asked),
                *cost,
                "merges" if self.mergeable else "does not merge",
            ]
        )


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer and its part's settings.

    Args:
        name: full module name.
        part: `vision`, `text`, ...
        module: the linear layer, holding the present weights.
        rank, alpha, energy_weight, energy_feature: see `PartConfig`; of a threshold that is `auto`, how far
            it may go.
        auto: which of the two are.
    """

    name: str
    part: str
    module: nn.Linear
    rank: int
    alpha: float
    energy_weight: float
    energy_feature: float
    auto: tuple[str, ...] = ()

    def capacity(self, protected: int) -> Capacity:
        """Return the layer's capacity with so many protected directions."""
        return Capacity(self.module.in_features, protected, self.part)


@dataclass
class TaskContext:
    """What a method may look at for one task.

    Args:
        index: 1 for the first task; 0 stands for the base before any task.
        name: the task's name.
        layers: name → adapted layer.
        gradients: runs the gradient pass over a share of the data into a statistic per layer:
            `gradients(fraction, statistics)`.
        batches: one pass over this process's share of the task's training data, in order, as the model on the
            task takes it.
        features: runs the feature pass: `features(make, fraction)` → layer name → statistic, where `make` is
            given the names of the layers, grouped by the tensor that they read; over all the data without a
            fraction.
        seed: of this task and stage, the same in every process.
        statistics_bytes: device memory for the statistics of one pass.
        model: the model, as it is in this stage.
        task: makes that model on the task, a `llava_keeplora.models.TaskModel`.
        pretrained: makes a frozen copy of the model as it was before the first task.
        deltas: reads what each earlier task left behind, in order.
        report: numbers that a method wants to see in the run folder.
        base: the report of the base, for a task.
        tasks: how many are announced.
        choose: part → the choice of its ε_w from the data, with `energy` in it.
    """

    index: int
    name: str
    layers: dict[str, Layer]
    gradients: Callable[[float, Mapping[str, Any]], None]
    features: Callable[..., Mapping[str, Any]]
    seed: int
    statistics_bytes: int
    batches: Callable[[], Iterator[dict[str, Tensor]]] = lambda: iter(())
    model: nn.Module | None = None
    task: Callable[[], Any] | None = None
    pretrained: Callable[[], nn.Module] | None = None
    deltas: Callable[[], list[Deltas]] = list
    report: dict[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    tasks: int = 0
    choose: Callable[[str], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Holding:
    """What a tensor is that a task keeps or adds.

    Args:
        shape: its lengths: a number, None for any, or a text for any that is the same wherever that text
            stands.
        basis: layers whose protected subspace its columns (in, m) extend; all tasks' together are
            orthonormal.
        required: whether every finished task has it.
        integer: whether it holds whole numbers.
    """

    shape: tuple[int | str | None, ...]
    basis: tuple[str, ...] = ()
    required: bool = True
    integer: bool = False


@dataclass(frozen=True)
class SubspacePlan:
    """What a method that protects a subspace of every layer computes from weights, gradients and features.

    From it, and without data, `llava-keeplora plan` estimates the memory of these stages.

    Args:
        protects_weights: whether the subspaces hold principal directions of the weights.
        protects_features: whether they hold directions that finished tasks used.
        sketched: whether the first gradient pass sums sketches instead of whole gradients.
        may_sketch: whether it sums whole gradients though the option `gradient: sketch` is there for it.
        features_from_gradient: whether a task's directions are taken from a gradient pass.
        every_position: whether the feature pass takes the prompts at every position of the text encoder.
        statistics: (groups of layers, bases, bytes, seed) → layer name → statistic of its features.
    """

    protects_weights: bool
    protects_features: bool
    sketched: bool
    may_sketch: bool
    features_from_gradient: bool
    every_position: bool
    statistics: Callable[[list[list[Layer]], Mapping[str, Tensor], int, int], Mapping[str, Any]]


class Method:
    """A continual-learning method: what happens before, during and after a task.

    `extra_state` returns what training left beside the deltas and `state_dict` what the last `after_task`
    added; `load_state_dicts` takes the list of all of these, so the run folder holds each thing once.
    """

    info: MethodInfo
    #: Whether there is anything to learn; where not, the zero-shot row is all there is.
    trainable = True
    #: What a stage costs beside training itself, in passes of the task's data through the model, for the
    #: estimate of time.
    stage_cost: dict[str, float] = {}
    #: Dropout on the adapters' input while training.
    dropout: float = 0.0
    #: Whether what it consolidates before any task depends on the model, its settings and the announced tasks
    #: alone, whatever their order and the seed: then runs that share a base cache compute it once.
    base_is_cacheable = False
    #: Whether what it trains may lie in the shards of ZeRO-3: not where it is read outside of its layers.
    supports_zero3 = True
    #: Whether it runs in one process alone.
    one_process = False
    #: Whether the gradient pass counts every example alike, and not as the loss does.
    counts_examples = False
    #: Whether the feature pass takes the prompts at every position of the text encoder, padding too.
    every_position = False
    #: Whether it puts LoRA adapters on the layers that a run names.
    uses_lora = True
    #: Whether it trains the whole model instead, every parameter but the root's own; see `find_changed`.
    full_finetuning = False
    #: Data beside the tasks', for a method that wants some.
    reference: Reference | None = None

    @dataclass(frozen=True)
    class Options:
        """The method's own settings."""

    def __init__(self, options: Any):
        self.options = options

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Refuse settings of the layers that the method can't follow, before anything is computed."""

    def least_statistics(self, layers: Mapping[str, Layer]) -> int:
        """Bytes below which `memory.statistics_gb` holds no statistics of one pass over the layers' features.

        0 where there are none.
        """
        return 0

    def subspace_plan(self) -> SubspacePlan | None:
        """Return what the method computes for protected subspaces that `llava-keeplora plan` can estimate."""
        return None

    def reference_data_spec(self) -> tuple[str, str | None] | None:
        """Return a recipe of pictures, and a file of texts or None for the recipe's own.

        They are read into `reference` before anything is computed.
        """

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Before a task: how each layer's adapter starts.

        A layer that is left out is named in `ctx.report`.
        """
        raise NotImplementedError

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Around a task's training, `model` carrying the adapters.

        What a method adds for that long is rebuilt here on every start.

        Parameters that it puts on the model are trained and kept with a killed run's training as the adapters
        are.
        """
        yield

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """The training loss of one batch; the task's own by default."""
        return out["loss"]

    def after_step(self, ctx: TaskContext, optimizer_step: int) -> None:
        """After an optimiser step."""

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """What a task leaves behind, from what its adapters learned.

        Inside `training_context`, after the last step.

        A module that is trained itself is left with what it learned, unless it is named here.
        """
        return deltas

    def extra_state(self) -> dict[str, Tensor]:
        """What a task's training leaves beside the deltas; inside `training_context`, after the last step."""
        return {}

    def progress(self) -> dict[str, Tensor]:
        """What a killed training needs beside what is trained, to be filled in place when it goes on.

        Inside `training_context`.
        """
        return {}

    def weight_offset(self, inits: Mapping[str, AdapterInit]) -> dict[str, Delta]:
        """Layer name → what is added to the working weights while a task trains."""
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        """After a task, on the merged model; with `ctx.index` 0, on the base before the first task."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the last `after_task` added."""
        return {}

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Take back what all tasks so far kept and added, the base's first.

        Nothing of before counts any more.

        Args:
            states: of each, what its training kept and its `after_task` added, together; the last one may not
                be consolidated yet.
        """

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """What a task's `extra_state` and `state_dict` may hold, by which a state from elsewhere is checked.

        Nothing by default.

        Args:
            ctx: of the task, with its index, name and layers, and the model without weights; nothing else of
                it is there.
            names: of the tensors that were found, for names that only data decide.
        """
        return {}

    def predictor(self, predictor: Predictor, task: str) -> Predictor:
        """What answers the examples of a task, with its classes; the model's own by default.

        Args:
            predictor: the model's own.
            task: the task's name.
        """
        return predictor

    def capacity(self) -> dict[str, int]:
        """Layer name → dimension of its protected subspace, for methods that have one."""
        return {}
