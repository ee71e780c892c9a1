"""The records of a run's configuration.

A run is: a model, the parts of it that are adapted, a sequence of tasks, and one or more labelled methods.
`training` is handed to `transformers.TrainingArguments` as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_keeplora.config.parts import PartConfig
from llava_keeplora.config.training_args import PER_TASK, per_task
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora_eval.aggregates import AGGREGATES
from llava_keeplora_eval.generation import MAX_NEW_TOKENS, check_generation

ZERO_SHOT = "zero-shot"

#: Test examples on which an export's logits are compared, unless told otherwise.
EXPORT_EXAMPLES = 8

#: What a row is read with: one prompt per class, or the averaged features of a recipe's test prompts.
ONE, AVERAGED = "one", "averaged"

#: What a row says of itself beside its method's options, parts and training; runs of release 0.1.0 have none
#: of these.
ROW_KEYS = ("test_prompts", "random_resized_crop")

#: The held-out part is the same for every seed and method, so that all are tuned on the same examples.
HOLDOUT_SEED = 0

#: A label is the name of a folder beside the run's own files.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

#: What makes a configuration one of several runs; see `llava_keeplora.compare`.
TABLE_KEYS = ("base", "seeds", "orders", "tuning")

#: Options of methods that say where data beside the tasks' lie; which data these are is held by the
#: fingerprints in the journal.
REFERENCE_PLACES = ("reference", "reference_texts")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is taught.

    Args:
        name_or_path: a Hub id, a local folder, or the name of an embedded model (`tiny-clip`).
        revision: commit, tag or branch on the Hub.
        dtype: data type of the base weights, `float32` or `bfloat16`.
        max_length: the most tokens of an example of a LLaVA model, image tokens included; the model's own
            limit when None.
        quantization: form of the frozen base's linear layers by bitsandbytes: `nf4` (double-quantised),
            `int8`, or None.
        family: what loads it and puts it on tasks, a plug-in's name (see docs/extending.md); by the
            checkpoint's own type when None.
        parts: part → dotted prefix of its layers, for a checkpoint of a type that is not known; those of the
            type when None.
    """

    name_or_path: str = "tiny-clip"
    revision: str | None = None
    dtype: str = "float32"
    max_length: int | None = None
    quantization: str | None = None
    family: str | None = None
    parts: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4", "int8"):
            raise ConfigError(
                f"quantization is '{self.quantization}'", "set it to 'nf4' or 'int8', or leave it out"
            )
        if self.family is not None and not isinstance(self.family, str):
            raise ConfigError(
                f"family is {self.family!r}, which is no name", "write module:Object, or leave it out"
            )
        if self.max_length is not None and not isinstance(self.max_length, int):
            raise ConfigError(
                f"max_length is {self.max_length!r}, but it is a number of tokens",
                "leave it out for the model's own limit",
            )
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(
                f"max_length is {self.max_length}, but an example has tokens",
                "leave it out for the model's own limit",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and what to do with bad ones.

    Args:
        root: the folder that relative recipe paths start from (`--data-root`).
        on_bad_image: `refuse` the run, or `drop` such images and record it.
        holdout: share of each task's training split to hold out and score instead of the test split.
        cache_gb: memory for decoded images; larger sets are decoded as they are needed.
    """

    root: str | None = None
    on_bad_image: str = "refuse"
    holdout: float = 0.0
    cache_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("refuse", "drop"):
            raise ConfigError(f"on_bad_image is '{self.on_bad_image}'", "set it to 'refuse' or 'drop'")
        if not 0.0 <= self.holdout < 1.0:
            raise ConfigError(
                f"holdout is {self.holdout}, but a share lies in [0, 1)", "set it to 0 or, say, 0.1"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """How predictions are made.

    Args:
        batch_size: examples per forward pass.
        max_new_tokens: where an answer of a LLaVA model is cut off at the latest.
        test_prompts: what CLIP is read with: `one` prompt, or the `averaged` features of each recipe's
            `test_prompts`; a method may have its own.
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
            raise ConfigError(f"test_prompts is '{self.test_prompts}'", f"set it to '{ONE}' or '{AVERAGED}'")
        if self.batch_size < 1:
            raise ConfigError(
                f"batch_size is {self.batch_size}, but a batch holds at least one example",
                "set it to 1 or more",
            )
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}, but an answer has at least one",
                "set it to 1 or more",
            )
        check_generation(self.generation)


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory the method's own sums may take on the device.

    Args:
        statistics_gb: memory for the statistics of one pass over a task's data, in 10⁹ bytes. Features are
            held exactly where they fit, and as sketches with a stated error where they don't.
    """

    statistics_gb: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.statistics_gb < math.inf:
            raise ConfigError(
                f"statistics_gb is {self.statistics_gb}, but a statistic takes memory", "leave it out for 4.0"
            )


@dataclass(frozen=True)
class MethodConfig:
    """One labelled method of a run.

    Args:
        label: the name of its folder and of its row in the table.
        method: the method's name, or a plug-in's (see docs/extending.md); the label when left out.
        options: the method's own options.
        parts: parts as this method adapts them: what it leaves out is the run's.
        training: arguments of `TrainingArguments` as this method trains: what it leaves out is the run's.
        test_prompts: as under `evaluation`, for this method alone.
        random_resized_crop: least and most share of a picture's area that CLIP trains on, cropped at random
            and scaled to a square; None for the picture as it is tested.
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
                f"random_resized_crop is {list(scale)}, but it is the least and most share of a picture's "
                "area",
                "set it to, say, [0.9, 1.0]",
            )


@dataclass(frozen=True)
class ExpectedConfig:
    """What was published for one row of the table, in percent.

    `llava-keeplora reproduce` compares a run with it, training ignores it.

    Args:
        source: where it was published, and what is known to differ.
        tolerance: how far from it a reproduction may lie, in percentage points.
        figures: aggregate → figure, for instance `transfer`; see `llava_keeplora_eval.aggregates`.
        last: task → its score after the last task.
    """

    source: str = ""
    tolerance: float = 1.0
    figures: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "source is missing, but a figure was published somewhere", "name the paper and the table"
            )
        if not self.tolerance > 0:
            raise ConfigError(
                f"tolerance is {self.tolerance}, but no run meets a rounded figure exactly",
                "set it to, say, 1.0",
            )
        for name in self.figures:
            if name not in AGGREGATES:
                raise ConfigError(
                    f"figures names '{name}', which no table has", nearest(str(name), AGGREGATES)
                )
        for name, value in {**self.figures, **self.last}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(
                    f"figures or last has {value!r} for '{name}', which is no number", "write percents"
                )


@dataclass(frozen=True)
class RunConfig:
    """One run; see the module's docstring.

    Args:
        output_dir: the run folder; relative to the working folder.
        base_cache: a folder in which runs find what another one computed of the same untouched model; each
            computes its own when None.
        seed: of adapters, order of examples and all that is drawn.
        sequence: a shipped sequence of tasks, in the place of `tasks`.
        tasks: the tasks in order, each a shipped recipe or a YAML file.
        model: which model is taught.
        parts: part → how it is adapted; a part that is not named is frozen.
        methods: label → a method's settings, side by side in one table.
        training: arguments of `transformers.TrainingArguments` by name; `num_train_epochs` and
            `learning_rate` may list a value for each task.
        data: where the images are and what to do with bad ones.
        evaluation: how predictions are made.
        memory: how much memory a method's own sums may take.
        expected: label → what was published for it, with which `llava-keeplora reproduce` compares.
    """

    output_dir: str = "runs/run"
    base_cache: str | None = None
    seed: int = 0
    sequence: str | None = None
    tasks: tuple[str, ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    parts: dict[str, PartConfig] = field(default_factory=dict)
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    expected: dict[str, ExpectedConfig] = field(default_factory=dict)

    def trainings(self, label: str) -> list[dict[str, Any]]:
        """`training` of a method as each task has it: what lists a value for each task is that task's."""
        training = self.methods[label].training
        own = {
            key: self._listed(label, key) for key in PER_TASK if key in training or key == "num_train_epochs"
        }
        return [training | {key: values[i] for key, values in own.items()} for i in range(len(self.tasks))]

    def _listed(self, label: str, key: str) -> list[float]:
        """An argument of `PER_TASK` for every task: one number or one per task."""
        training = self.methods[label].training
        values = per_task(training, key, len(self.tasks))
        if key == "num_train_epochs" and not all(0 < value < float("inf") for value in values):
            raise ConfigError(
                f"training.{key} is {training[key]}, but a task is trained for more than nothing",
                "give positive numbers",
            )
        if key == "learning_rate" and not all(0 <= value < math.inf for value in values):
            raise ConfigError(
                f"training.{key} is {training[key]}, but a rate is a number from 0 on",
                "give, for instance, 5e-4",
            )
        if len(values) != len(self.tasks):
            raise ConfigError(
                f"training.{key} lists {len(values)} values for {len(self.tasks)} tasks",
                "give one number, or one per task",
            )
        return values

    def first_alike(self, label: str) -> str:
        """Return the first row, untouched model included, that reads with a method's prompts."""
        read = {ZERO_SHOT: self.evaluation.test_prompts} | {
            own: method.test_prompts for own, method in self.methods.items()
        }
        return next(row for row, prompts in read.items() if prompts == read[label])

    def first(self, count: int) -> RunConfig:
        """The run of the first tasks alone.

        Args:
            count: how many.
        """
        return self._with_tasks(
            self.tasks[:count], lambda training, key: per_task(training, key, len(self.tasks))[:count]
        )

    def followed_by(self, task: str, own: Mapping[str, float] | None = None) -> RunConfig:
        """The run with one more task.

        Args:
            task: its recipe, by name or file.
            own: arguments of `PER_TASK` that it has for itself; the others are those of every task.

        Raises:
            ConfigError: if an argument lists a value for each task and none is given for the new one.
        """
        own = dict(own or {})

        def longer(training: Mapping[str, Any], key: str) -> list[float]:
            if key not in own:
                raise ConfigError(
                    f"training.{key} lists a number for each task and none for the new one",
                    f"give it with {PER_TASK[key][1]}",
                )
            return [*per_task(training, key, len(self.tasks)), own[key]]

        return self._with_tasks((*self.tasks, task), longer, own)

    def _with_tasks(
        self,
        tasks: tuple[str, ...],
        values: typing.Callable[[Mapping[str, Any], str], list[float]],
        always: typing.Collection[str] = (),
    ) -> RunConfig:
        """This run on other tasks; one number for all stays one, unless `always` has the argument."""

        def trained(training: dict[str, Any]) -> dict[str, Any]:
            return training | {
                key: values(training, key)
                for key in PER_TASK
                if isinstance(training.get(key), (list, tuple)) or key in always
            }

        methods = {
            label: dataclasses.replace(method, training=trained(method.training))
            for label, method in self.methods.items()
        }
        return dataclasses.replace(
            self, sequence=None, tasks=tasks, methods=methods, training=trained(self.training)
        )
