"""The records of a run's configuration.

A run has a model, the parts of it that are adapted, a sequence of tasks, and one or more labelled methods.
`training` holds arguments of `transformers.TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_keeplora.config.expected import ExpectedConfig
from llava_keeplora.config.guard import GuardConfig
from llava_keeplora.config.parts import PartConfig
from llava_keeplora.config.training_args import PER_TASK, per_task
from llava_keeplora.errors import ConfigError
from llava_keeplora_eval.generation import MAX_NEW_TOKENS, check_generation

ZERO_SHOT = "zero-shot"

#: Default number of test examples on which an export's logits are compared.
EXPORT_EXAMPLES = 8

#: Test prompts of a row: one prompt per class, or the averaged features of a recipe's test prompts.
ONE, AVERAGED = "one", "averaged"

#: Keys of a method in addition to its options, parts and training; runs of release 0.1.0 have none of these.
ROW_KEYS = ("test_prompts", "random_resized_crop")

#: The held-out examples are the same for every seed and method, so that all are tuned on the same examples.
HOLDOUT_SEED = 0

#: Form of a label, which is the name of a folder next to the run's own files.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

#: Keys that make a configuration one of several runs; see `llava_keeplora.compare`.
TABLE_KEYS = ("base", "seeds", "orders", "tuning")
#: Key that a run's configuration may have for the table that `llava-keeplora compare` makes of it.
OTHER_BUDGET = "other_budget"

#: Options of methods that say where reference or general data are; the data themselves are identified by
#: their fingerprints in the journal.
REFERENCE_PLACES = ("reference", "reference_texts", "general")


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of the base model.

    Args:
        name_or_path: a Hub id, a local folder, or the name of an embedded model (`tiny-clip`).
        revision: commit, tag or branch on the Hub.
        dtype: data type of the base weights, `float32` or `bfloat16`.
        max_length: the most tokens of an example of a LLaVA model, image tokens included; the model's own
            limit when None.
        quantization: bitsandbytes quantisation of the frozen base's linear layers: `nf4` (double-quantised),
            `int8`, or None.
        attn_implementation: how transformers computes attention: `sdpa`, `eager`, `flash_attention_2` or
            another one that it knows.
        family: the model family, possibly a plug-in (see docs/extending.md); chosen by the checkpoint's
            `model_type` when None.
        parts: part → dotted prefix of its layers, for a checkpoint of an unknown type; those of the type when
            None.
        object: the class of a model that a Python program gives in the place of a checkpoint
            (docs/library.md); `Run` sets it.
    """

    name_or_path: str = "tiny-clip"
    revision: str | None = None
    dtype: str = "float32"
    max_length: int | None = None
    quantization: str | None = None
    attn_implementation: str = "sdpa"
    family: str | None = None
    parts: Mapping[str, str] | None = None
    object: str | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4", "int8"):
            raise ConfigError(
                f"quantization must be 'nf4' or 'int8' (got '{self.quantization}')",
                "set it to 'nf4' or 'int8', or leave it out",
            )
        if not isinstance(self.attn_implementation, str) or not self.attn_implementation:
            raise ConfigError(
                f"attn_implementation must be a name (got {self.attn_implementation!r})",
                "write sdpa, eager or another one that transformers knows, or leave it out for sdpa",
            )
        if self.family is not None and not isinstance(self.family, str):
            raise ConfigError(
                f"family must be a name (got {self.family!r})", "write module:Object, or leave it out"
            )
        if self.max_length is not None and not isinstance(self.max_length, int):
            raise ConfigError(
                f"max_length must be a whole number of tokens (got {self.max_length!r})",
                "leave it out for the model's own limit",
            )
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(
                f"max_length must be at least 1 (got {self.max_length})",
                "leave it out for the model's own limit",
            )

    def check_place(self) -> None:
        """Check that the model is a checkpoint, which can be loaded again.

        Raises:
            ConfigError: it is a model of a Python program.
        """
        if self.object:
            raise ConfigError(
                f"the run's model is an object of a Python program, a {self.object}, which is not given here",
                "go on in Python, with Run.open(FOLDER, model=model, processor=processor)",
            )


@dataclass(frozen=True)
class DataConfig:
    """Configuration of the data and of their images.

    Args:
        root: the folder that relative recipe paths start from (`--data-root`).
        on_bad_image: for unreadable images, `refuse` the run, or `drop` and record them.
        holdout: fraction of each task's training split that is held out and scored instead of the test split.
        train_examples: about how many training examples of a task are used, with the same share of every
            class; 0 for all of them.
        cache_gb: memory for preprocessed images, in gigabytes; sets that do not fit are decoded when needed.
    """

    root: str | None = None
    on_bad_image: str = "refuse"
    holdout: float = 0.0
    train_examples: int = 0
    cache_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("refuse", "drop"):
            raise ConfigError(
                f"on_bad_image must be 'refuse' or 'drop' (got '{self.on_bad_image}')",
                "set it to 'refuse' or 'drop'",
            )
        if not 0.0 <= self.holdout < 1.0:
            raise ConfigError(f"holdout must be in [0, 1) (got {self.holdout})", "set it to 0 or, say, 0.1")
        if self.train_examples < 0:
            raise ConfigError(
                f"train_examples must not be negative (got {self.train_examples})",
                "leave it out for all examples",
            )
        if not 0.0 <= self.cache_gb < math.inf:
            raise ConfigError(
                f"cache_gb must be finite and not negative (got {self.cache_gb})", "leave it out for 4.0"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """Configuration of how predictions are made.

    Args:
        batch_size: examples per forward pass.
        max_new_tokens: the most tokens of an answer of a LLaVA model.
        test_prompts: class prompts of CLIP at test: `one` per class, or the `averaged` features of each
            recipe's `test_prompts`; a method can override it.
        generation: settings of a LLaVA model's answers other than greedy ones, by the names of transformers'
            `GenerationConfig` (`num_beams`, `repetition_penalty`, ...; see
            `llava_keeplora_eval.generation.SETTINGS`).
    """

    batch_size: int = 128
    max_new_tokens: int = MAX_NEW_TOKENS
    test_prompts: str = ONE
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.test_prompts not in (ONE, AVERAGED):
            raise ConfigError(
                f"test_prompts must be '{ONE}' or '{AVERAGED}' (got '{self.test_prompts}')",
                f"set it to '{ONE}' or '{AVERAGED}'",
            )
        if self.batch_size < 1:
            raise ConfigError(
                f"batch_size must be at least 1 (got {self.batch_size})",
                "set it to 1 or more",
            )
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens must be at least 1 (got {self.max_new_tokens})",
                "set it to 1 or more",
            )
        check_generation(self.generation)


@dataclass(frozen=True)
class MemoryConfig:
    """Configuration of the device memory that a method's statistics may take.

    Args:
        statistics_gb: limit for the statistics of one pass over a task's data, in 10⁹ bytes. Statistics of
            features are exact if they fit, and otherwise sketches with a stated error.
    """

    statistics_gb: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.statistics_gb < math.inf:
            raise ConfigError(
                f"statistics_gb must be above 0 and finite (got {self.statistics_gb})", "leave it out for 4.0"
            )


@dataclass(frozen=True)
class MethodConfig:
    """Configuration of one labelled method of a run.

    Args:
        label: the name of its folder and of its row in the table.
        method: the method's name, or a plug-in's (see docs/extending.md); the label when left out.
        options: the method's own options.
        parts: the parts as this method adapts them; what it leaves out is the run's.
        training: this method's arguments of `TrainingArguments`; what it leaves out is the run's.
        test_prompts: as under `evaluation`, for this method alone.
        random_resized_crop: least and largest fraction of an image's area that is cropped at random for
            CLIP's training, and scaled to a square; None for images as in the test.
    """

    label: str
    method: str
    options: dict[str, Any]
    parts: dict[str, PartConfig]
    training: dict[str, Any]
    test_prompts: str = ONE
    random_resized_crop: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        scale = self.random_resized_crop
        if scale is not None and not (
            len(scale) == 2
            and all(isinstance(bound, (int, float)) for bound in scale)
            and 0 < scale[0] <= scale[1] <= 1
        ):
            raise ConfigError(
                "random_resized_crop must be two fractions of an image's area, 0 < least <= largest <= 1 "
                f"(got {list(scale)})",
                "set it to, say, [0.9, 1.0]",
            )


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run.

    Args:
        output_dir: the run folder, relative to the working folder.
        base_cache: a folder in which runs share what they compute of the same untouched model; not shared
            when None.
        seed: seed of adapters, order of examples and everything else that is drawn at random.
        sequence: a shipped sequence of tasks, instead of `tasks`.
        tasks: the tasks in order, each a shipped recipe or a YAML file.
        adopted: for each task, the PEFT adapter or merged checkpoint that its update is taken from instead of
            a training (a folder, or `user/name` on the Hub), null for a task that is trained; see
            docs/adopt.md. None is adopted when empty.
        model: the base model.
        parts: part → how it is adapted; a part that is not named is frozen.
        methods: label → a method's settings; all methods are rows of one table.
        training: arguments of `transformers.TrainingArguments` by name; `num_train_epochs` and
            `learning_rate` accept a list with one value per task.
        data: where the images are, and what to do with unreadable ones.
        evaluation: how predictions are made.
        memory: limit of the memory of a method's statistics.
        expected: label → published figures, with which `llava-keeplora reproduce` compares.
        guard: limits that every task is judged by; none when None.
    """

    output_dir: str = "runs/run"
    base_cache: str | None = None
    seed: int = 0
    sequence: str | None = None
    tasks: tuple[str, ...] = ()
    adopted: tuple[str | None, ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    parts: dict[str, PartConfig] = field(default_factory=dict)
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    expected: dict[str, ExpectedConfig] = field(default_factory=dict)
    guard: GuardConfig | None = None

    def __post_init__(self) -> None:
        if self.adopted and len(self.adopted) != len(self.tasks):
            raise ConfigError(
                f"adopted lists {len(self.adopted)} sources for {len(self.tasks)} tasks",
                "list one per task, null for a task that is trained, or leave it out",
            )

    @property
    def held_out(self) -> float:
        """Share of every task's training examples that no method is trained on; see `GuardConfig`."""
        return self.guard.held_out if self.guard and self.guard.shrinks else 0.0

    def source(self, index: int) -> str | None:
        """Return what a task's update is adopted from, counted from 1; None for a task that is trained."""
        return self.adopted[index - 1] if index and self.adopted else None

    def trainings(self, label: str) -> list[dict[str, Any]]:
        """Return a method's `training` for each task, with one value for arguments that list one per task.

        Raises:
            ConfigError: if such a list has another length, or a value is out of range.
        """
        training = self.methods[label].training
        lists = {
            key: self._values(label, key) for key in PER_TASK if key in training or key == "num_train_epochs"
        }
        return [training | {key: values[i] for key, values in lists.items()} for i in range(len(self.tasks))]

    def _values(self, label: str, key: str) -> list[float]:
        """Return the values of an argument of `PER_TASK`, one per task."""
        training = self.methods[label].training
        values = per_task(training, key, len(self.tasks))
        if key == "num_train_epochs" and not all(0 < value < float("inf") for value in values):
            raise ConfigError(
                f"training.{key} must be above 0 and finite (got {training[key]})",
                "give positive numbers",
            )
        if key == "learning_rate" and not all(0 <= value < math.inf for value in values):
            raise ConfigError(
                f"training.{key} must not be negative, and must be finite (got {training[key]})",
                "give, for instance, 5e-4",
            )
        if len(values) != len(self.tasks):
            raise ConfigError(
                f"training.{key} lists {len(values)} values for {len(self.tasks)} tasks",
                "give one number, or one per task",
            )
        return values

    def first_alike(self, label: str) -> str:
        """Return the first row, `zero-shot` included, that is tested with the same prompts as a method."""
        prompts = {ZERO_SHOT: self.evaluation.test_prompts} | {
            row: method.test_prompts for row, method in self.methods.items()
        }
        return next(row for row, of_row in prompts.items() if of_row == prompts[label])

    def first(self, count: int) -> RunConfig:
        """Return the configuration of a run of the first `count` tasks."""
        return self.of_tasks(range(count))

    def of_tasks(self, places: typing.Sequence[int]) -> RunConfig:
        """Return the configuration of a run of some of the tasks, by their places, counted from 0."""

        def values(training: Mapping[str, Any], key: str) -> list[float]:
            return [per_task(training, key, len(self.tasks))[i] for i in places]

        adopted = tuple(self.adopted[i] for i in places if self.adopted)
        return self._with_tasks(tuple(self.tasks[i] for i in places), values, adopted=adopted)

    def followed_by(
        self, task: str, arguments: Mapping[str, float] | None = None, source: str | None = None
    ) -> RunConfig:
        """Return the configuration of the run with one more task.

        Args:
            task: its recipe, by name or file.
            source: what its update is adopted from; None if it is trained.
            arguments: arguments of `PER_TASK` of the new task alone; others are the same for every task.

        Raises:
            ConfigError: if an argument lists a value for each task and `arguments` has none for the new one.
        """
        arguments = dict(arguments or {})

        def longer(training: Mapping[str, Any], key: str) -> list[float]:
            if key not in arguments and source:
                return [*per_task(training, key, len(self.tasks)), PER_TASK[key][0]]
            if key not in arguments:
                raise ConfigError(
                    f"training.{key} lists a number for each task, but has none for the new one",
                    f"give it with {PER_TASK[key][1]}",
                )
            return [*per_task(training, key, len(self.tasks)), arguments[key]]

        adopted = (*(self.adopted or (None,) * len(self.tasks)), source) if source or self.adopted else ()
        return self._with_tasks((*self.tasks, task), longer, arguments, adopted)

    def _with_tasks(
        self,
        tasks: tuple[str, ...],
        values: typing.Callable[[Mapping[str, Any], str], list[float]],
        always: typing.Collection[str] = (),
        adopted: tuple[str | None, ...] = (),
    ) -> RunConfig:
        """Return this configuration with other tasks.

        Args:
            tasks: the new tasks.
            values: (training, argument of `PER_TASK`) → its values for the new tasks.
            always: arguments that become a list even if they are one number for all tasks.
            adopted: what the new tasks' updates are adopted from.
        """

        def adapted(training: dict[str, Any]) -> dict[str, Any]:
            return training | {
                key: values(training, key)
                for key in PER_TASK
                if isinstance(training.get(key), (list, tuple)) or key in always
            }

        methods = {
            label: dataclasses.replace(method, training=adapted(method.training))
            for label, method in self.methods.items()
        }
        return dataclasses.replace(
            self,
            sequence=None,
            tasks=tasks,
            adopted=adopted if any(adopted) else (),
            methods=methods,
            training=adapted(self.training),
        )
