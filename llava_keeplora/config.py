"""One run as data: YAML in, frozen records out, every unknown key refused.

A run is: a model, the parts of it that are adapted, a sequence of tasks, and one or more
labelled methods. `training` is handed to `transformers.TrainingArguments` as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_keeplora.errors import ConfigError, RunError, UserError, nearest
from llava_keeplora.records import read_record
from llava_keeplora.registries import METHODS, localize_plugins, plugin_identity, safe_label
from llava_keeplora_eval.aggregates import AGGREGATES
from llava_keeplora_eval.generation import MAX_NEW_TOKENS, check_generation
from llava_keeplora_recipes import Recipe, TaskData, load_recipe, load_sequence
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.recipe_rules import MAX_NAME
from llava_keeplora_recipes.registry import PluginError, UnknownNameError
from llava_keeplora_recipes.strict_json import decode_text, parse_json
from llava_keeplora_recipes.strict_yaml import MAX_DEPTH, is_file_name, parse_yaml, read_mapping

SHIPPED = Path(__file__).parent / "configs"
ZERO_SHOT = "zero-shot"
#: Test examples on which an export's logits are compared, unless told otherwise.
EXPORT_EXAMPLES = 8
#: PEFT's word for every linear layer; here of a part.
ALL_LINEAR = "all-linear"
#: What a threshold is that a run chooses from the data, and how far it may go.
AUTO = "auto"
AUTO_LIMITS = {"energy_weight": 0.95, "energy_feature": 0.99}
#: What a row is read with: one prompt per class, or the averaged features of a recipe's test prompts.
ONE, AVERAGED = "one", "averaged"
#: What a row says of itself beside its method's options, parts and training; runs of release 0.1.0 have none of these.
ROW_KEYS = ("test_prompts", "random_resized_crop")
#: The held-out part is the same for every seed and method, so that all are tuned on the same examples.
HOLDOUT_SEED = 0
#: A label is the name of a folder beside the run's own files.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
RUN_FILES = (
    "config.json", "identity.json", "versions.json", "recipes", "results.json",
    "report.html", "table.md", "table.tex", "summary.csv", "scores.csv", "export",
)
#: What makes a configuration one of several runs; see `llava_keeplora.compare`.
TABLE_KEYS = ("base", "seeds", "orders", "tuning")

#: Arguments of `TrainingArguments` that say where and in how many pieces a step is computed and who watches, not what it is.
MACHINE_ARGUMENTS = (
    "report_to", "run_name",
    "deepspeed", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "activation_checkpointing",
    "dataloader_num_workers", "dataloader_pin_memory", "save_steps",
)

#: YAML 1.1's words for true and false, as they are read where nothing else can be meant.
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
#: What a run has that names no methods.
DEFAULT_METHODS: Mapping[str, Any] = {"keeplora": {}}
#: Arguments of `TrainingArguments` that may list a value for each task: what they are where nothing is said, and what gives a new task its own.
PER_TASK = {"num_train_epochs": (1.0, "--epochs"), "learning_rate": (5e-5, "--learning-rate")}

#: Options of methods that say where data beside the tasks' lie; which data these are is held by the fingerprints in the journal.
REFERENCE_PLACES = ("reference", "reference_texts")

#: Arguments of `TrainingArguments` that the driver sets itself, and what to set instead.
DRIVER_ARGUMENTS = {
    "output_dir": "set the top-level output_dir",
    "seed": "set the top-level seed",
    "data_seed": "set the top-level seed",
    "save_strategy": "set training.save_steps, the steps between two checkpoints within a task",
    "eval_strategy": "every task is scored after each one",
    "remove_unused_columns": "the collator decides what the model sees",
    "resume_from_checkpoint": "run the same command again to go on",
    "do_train": "the driver trains",
}

#: Arguments of `TrainingArguments` that training fails with or goes without, the values that it does not, and what to do instead.
WITHOUT = {
    "auto_find_batch_size": ((False,), "set a batch size that `llava-keeplora plan` says fits"),
    "batch_eval_metrics": ((False,), "every task is scored after each one"),
    "eval_on_start": ((False,), "every task is scored before the first one"),
    "fsdp": ((None, ""), "spread the training with training.deepspeed"),
    "label_smoothing_factor": ((0.0,), "use a method that has an option label_smoothing"),
    "neftune_noise_alpha": ((None,), "leave it out"),
    "parallelism_config": ((None,), "spread the training with training.deepspeed"),
    "push_to_hub": ((False,), "push what was learned with `llava-keeplora export --push`"),
    "train_sampling_strategy": (("random", "sequential"), "leave it out for a random order"),
    "use_liger_kernel": ((False,), "leave it out"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Which model is taught.

    Args:
        name_or_path: a Hub id, a local folder, or the name of an embedded model (`tiny-clip`).
        revision: the Hub revision.
        dtype: of the base weights, `float32` or `bfloat16`.
        max_length: the most tokens of an example of a LLaVA model, image tokens included; the model's own limit when None.
        quantization: form of the frozen base's linear layers by bitsandbytes: `nf4` (double-quantised), `int8`, or None.
        family: what loads it and puts it on tasks, a plug-in's name (see docs/extending.md); by the checkpoint's own type when None.
    """

    name_or_path: str = "tiny-clip"
    revision: str | None = None
    dtype: str = "float32"
    max_length: int | None = None
    quantization: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4", "int8"):
            raise ConfigError(f"quantization is '{self.quantization}'", "set it to 'nf4' or 'int8', or leave it out")
        if self.family is not None and not isinstance(self.family, str):
            raise ConfigError(f"family is {self.family!r}, which is no name", "write module:Object, or leave it out")
        if self.max_length is not None and not isinstance(self.max_length, int):
            raise ConfigError(f"max_length is {self.max_length!r}, but it is a number of tokens", "leave it out for the model's own limit")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}, but an example has tokens", "leave it out for the model's own limit")


@dataclass(frozen=True)
class PartConfig:
    """How one part of the model is adapted: `vision` and `text` of CLIP; `vision`, `projector` and `language` of LLaVA.

    A part that is not named is frozen.

    Args:
        targets: leaf names of the linear layers, for instance `q_proj`, or `all-linear` for every linear layer of the part, as in PEFT;
            the model family's usual ones when None.
        train: `adapter`, or `full` to train weight and bias themselves, unprotected, as LLaVA's recipes train the projector.
        rank: r, the rank of each task's delta.
        alpha: the scale of a delta is alpha / rank.
        energy_weight: ε_w in (0, 1], the share of each weight's energy that is protected; `auto` chooses it, see docs/analysis.md.
        energy_feature: ε_f in (0, 1], the share of each task's feature energy that is protected; `auto` gives each task a budget of directions.
        learning_rate: of this part; `training.learning_rate` when None.
    """

    targets: tuple[str, ...] | str | None = None
    train: str = "adapter"
    rank: int = 16
    alpha: float = 16.0
    energy_weight: float | str = 0.85
    energy_feature: float | str = 0.99
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.train not in ("adapter", "full"):
            raise ConfigError(f"train is '{self.train}'", "set it to 'adapter' or 'full', or leave the part out to freeze it")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, but a part that is named is trained", "leave the part out to freeze it")
        for name in ("energy_weight", "energy_feature"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(f"{name} is '{value}'", "set it to a share of energy such as 0.85, or to 'auto'")
            if value != AUTO and not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"{name} is {value}, but a share of energy lies in (0, 1]",
                    f"set it to a value such as 0.85; to protect nothing, use the method's "
                    f"{'protect_weights' if name == 'energy_weight' else 'protect_features'}: false",
                )
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, but an adapter needs at least one direction", "set rank to 1 or more")
        if not self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha}, but the scale alpha / rank must be above zero", "set alpha to the rank for a scale of 1")
        object.__setattr__(self, "targets", _read_targets(self.targets))

    @property
    def auto(self) -> tuple[str, ...]:
        """Which of the two thresholds are `auto`."""
        return tuple(name for name in AUTO_LIMITS if getattr(self, name) == AUTO)

    def energy(self, name: str) -> float:
        """A threshold as a number: of one that is `auto`, how far it may go.

        Args:
            name: `energy_weight` or `energy_feature`.
        """
        return AUTO_LIMITS[name] if name in self.auto else getattr(self, name)


def _read_targets(targets: Any) -> tuple[str, ...] | None:
    """Leaf names as a list, whether a configuration lists them, names one, or writes PEFT's `all-linear`.

    PEFT reads any other text as a pattern for whole module names, which would be one for all parts; parts are named here.

    Raises:
        ConfigError: for a pattern, a name with a path, or nothing.
    """
    if targets is None:
        return None
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise ConfigError("targets is empty, so nothing would be adapted", "name at least one layer or leave the part out")
    for name in names:
        if not isinstance(name, str) or not (name == ALL_LINEAR or re.fullmatch(r"\w+", name)):
            raise ConfigError(
                f"targets names {name!r}, but a target is the last part of a layer's name, such as q_proj, and no path or pattern",
                f"list such names, or write {ALL_LINEAR} for every linear layer of the part",
            )
    if ALL_LINEAR in names and len(names) > 1:
        raise ConfigError(f"targets lists {ALL_LINEAR} beside {', '.join(n for n in names if n != ALL_LINEAR)}, which it holds already", f"write {ALL_LINEAR} alone")
    return names


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
            raise ConfigError(f"holdout is {self.holdout}, but a share lies in [0, 1)", "set it to 0 or, say, 0.1")

    def splits(self, recipe: Recipe) -> tuple[TaskData, TaskData]:
        """What a task is trained and scored on.

        Raises:
            RecipeError: for whatever is wrong with the recipe's data.
        """
        train = recipe.load("train", self.root, self.on_bad_image)
        return train.split_holdout(self.holdout, HOLDOUT_SEED) if self.holdout else (train, recipe.load("test", self.root, self.on_bad_image))


@dataclass(frozen=True)
class EvaluationConfig:
    """How predictions are made.

    Args:
        batch_size: examples per forward pass.
        max_new_tokens: where an answer of a LLaVA model is cut off at the latest.
        test_prompts: what CLIP is read with: `one` prompt, or the `averaged` features of each recipe's `test_prompts`; a method may have
            its own.
        generation: settings of a LLaVA model's answers other than greedy ones, by the names of transformers' `GenerationConfig`
            (`num_beams`, `repetition_penalty`, ...; see `llava_keeplora_eval.generation.SETTINGS`).
    """

    batch_size: int = 128
    max_new_tokens: int = MAX_NEW_TOKENS
    test_prompts: str = ONE
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.test_prompts not in (ONE, AVERAGED):
            raise ConfigError(f"test_prompts is '{self.test_prompts}'", f"set it to '{ONE}' or '{AVERAGED}'")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, but a batch holds at least one example", "set it to 1 or more")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, but an answer has at least one", "set it to 1 or more")
        check_generation(self.generation)


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory the method's own sums may take on the device.

    Args:
        statistics_gb: for the statistics of one pass over a task's data, in 10⁹ bytes. Features are held exactly where they
            fit, and as sketches with a stated error where they don't.
    """

    statistics_gb: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.statistics_gb < math.inf:
            raise ConfigError(f"statistics_gb is {self.statistics_gb}, but a statistic takes memory", "leave it out for 4.0")


@dataclass(frozen=True)
class MethodConfig:
    """One labelled method of a run.

    Args:
        label: the name of its folder and of its row in the table.
        method: the method's name in the registry.
        options: the method's own options.
        parts: parts as this method adapts them; none for one without adapters.
        training: arguments for `TrainingArguments` as this method trains.
        test_prompts: see `EvaluationConfig`.
        random_resized_crop: least and most share of a picture's area that CLIP trains on, cropped at random and scaled to a square; None
            for the picture as it is tested.
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
        if scale is not None and not (len(scale) == 2 and all(isinstance(bound, (int, float)) for bound in scale) and 0 < scale[0] <= scale[1] <= 1):
            raise ConfigError(f"random_resized_crop is {list(scale)}, but it is the least and most share of a picture's area", "set it to, say, [0.9, 1.0]")


@dataclass(frozen=True)
class ExpectedConfig:
    """What was published for one row of the table, in percent; `llava-keeplora reproduce` compares a run with it, training ignores it.

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
            raise ConfigError("source is missing, but a figure was published somewhere", "name the paper and the table")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance is {self.tolerance}, but no run meets a rounded figure exactly", "set it to, say, 1.0")
        for name in self.figures:
            if name not in AGGREGATES:
                raise ConfigError(f"figures names '{name}', which no table has", nearest(str(name), AGGREGATES))
        for name, value in {**self.figures, **self.last}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"figures or last has {value!r} for '{name}', which is no number", "write percents")


@dataclass(frozen=True)
class RunConfig:
    """One run; see the module's docstring.

    Args:
        base_cache: a folder in which runs find what another one computed of the same untouched model; each computes its own when None.
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
        own = {key: self._listed(label, key) for key in PER_TASK if key in training or key == "num_train_epochs"}
        return [training | {key: values[i] for key, values in own.items()} for i in range(len(self.tasks))]

    def _listed(self, label: str, key: str) -> list[float]:
        """An argument of `PER_TASK` for every task: one number or one per task."""
        training = self.methods[label].training
        values = _per_task(training, key, len(self.tasks))
        if key == "num_train_epochs" and not all(0 < value < float("inf") for value in values):
            raise ConfigError(f"training.{key} is {training[key]}, but a task is trained for more than nothing", "give positive numbers")
        if key == "learning_rate" and not all(0 <= value < math.inf for value in values):
            raise ConfigError(f"training.{key} is {training[key]}, but a rate is a number from 0 on", "give, for instance, 5e-4")
        if len(values) != len(self.tasks):
            raise ConfigError(f"training.{key} lists {len(values)} values for {len(self.tasks)} tasks", "give one number, or one per task")
        return values

    def first_alike(self, label: str) -> str:
        """The first row, the untouched model's at the head, that is read with the same prompts as a method."""
        read = {ZERO_SHOT: self.evaluation.test_prompts} | {own: method.test_prompts for own, method in self.methods.items()}
        return next(row for row, prompts in read.items() if prompts == read[label])

    def identity(self) -> dict[str, Any]:
        """Return what a result depends on.

        That is everything but where run, recipes and data lie, how they are cached, what was published, on what machines a step
        is computed, and how much memory statistics may take (each task's file says whether features are exact or sketched).

        Tasks go by their names here; that a name means the same data and recipe is held by the fingerprints in the journal, and so are
        reference data.

        Raises:
            RecipeError: if a task's recipe is not there or cannot be read.
            ConfigError: if a task is named twice.
            PluginError: if the source of a plug-in is not there.
        """
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        places = ((tree, "output_dir"), (tree, "base_cache"), (tree, "sequence"), (tree, "expected"), (tree["data"], "root"), (tree, "memory"))
        for section, key in (*places, (tree["evaluation"], "batch_size"), (tree["data"], "cache_gb")):
            section.pop(key)
        if not tree["evaluation"]["generation"]:
            tree["evaluation"].pop("generation")  # Runs that were begun before it could be set have none.
        for method in tree["methods"].values():
            method["options"] = {key: value for key, value in method["options"].items() if key not in REFERENCE_PLACES}
        # As before there was a choice, so that older runs keep their identity.
        for section in (tree["evaluation"], *tree["methods"].values()):
            section.pop("test_prompts") if section["test_prompts"] == ONE else None
        for method in tree["methods"].values():
            method.pop("random_resized_crop") if method["random_resized_crop"] is None else None
        if tree["model"]["family"] is None:
            tree["model"].pop("family")
        plugin_identity(tree)
        tree["tasks"] = [recipe.name for recipe in load_recipes(self.tasks)]
        for section in (tree, *tree["methods"].values()):
            own = {key: _per_task(section["training"], key, len(self.tasks)) for key in PER_TASK}
            section["training"] = _machine_independent(section["training"]) | {k: values if len(set(values)) > 1 else values[0] for k, values in own.items()}
        return tree

    def first(self, count: int) -> RunConfig:
        """The run of the first tasks alone.

        Args:
            count: how many.
        """
        return self._with_tasks(self.tasks[:count], lambda training, key: _per_task(training, key, len(self.tasks))[:count])

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
                raise ConfigError(f"training.{key} lists a number for each task and none for the new one", f"give it with {PER_TASK[key][1]}")
            return [*_per_task(training, key, len(self.tasks)), own[key]]

        return self._with_tasks((*self.tasks, task), longer, own)

    def _with_tasks(
        self, tasks: tuple[str, ...], values: typing.Callable[[Mapping[str, Any], str], list[float]], always: typing.Collection[str] = (),
    ) -> RunConfig:
        """This run on other tasks; one number for all stays one, unless `always` has the argument."""

        def trained(training: dict[str, Any]) -> dict[str, Any]:
            return training | {key: values(training, key) for key in PER_TASK if isinstance(training.get(key), (list, tuple)) or key in always}

        methods = {label: dataclasses.replace(method, training=trained(method.training)) for label, method in self.methods.items()}
        return dataclasses.replace(self, sequence=None, tasks=tasks, methods=methods, training=trained(self.training))

    def deepspeed(self) -> dict[str, Any] | None:
        """The ZeRO configuration of the run, its precision as it will be; None without one.

        Raises:
            ConfigError: if methods have different ones, or one contradicts `model.dtype` or `model.quantization`, or has no stage that there is.
        """
        named = {label: method.training.get("deepspeed") for label, method in self.methods.items()}
        if len({json.dumps(value, sort_keys=True) for value in named.values()}) > 1:
            told = " and ".join(f"{value!r} for '{label}'" for label, value in named.items())
            raise ConfigError(f"training.deepspeed is {told}, but the methods of a run share one model", "give all methods the same, or run them apart")
        value = next(iter(named.values()), None)
        if not value:
            return None
        content = read_deepspeed(Path(value), "training.deepspeed") if isinstance(value, str) else json.loads(json.dumps(value))
        content = as_mapping(content, "training.deepspeed")
        content |= {key: as_mapping(content[key], f"training.deepspeed.{key}") for key in ("bf16", "fp16", "zero_optimization") if key in content}
        stage = content.get("zero_optimization", {}).get("stage", 0)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise ConfigError(f"the DeepSpeed configuration has zero_optimization.stage {stage!r}", "set it to 0, 1, 2 or 3")
        for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            section = content.get(precision, {})
            if section.get("enabled") == "auto":
                section["enabled"] = all(method.training.get(precision) is True for method in self.methods.values())
            # DeepSpeed turns the whole model into the precision of its own configuration, for good.
            if bool(section.get("enabled", False)) != (self.model.dtype == dtype):
                raise ConfigError(
                    f"the DeepSpeed configuration has {precision}.enabled {json.dumps(section.get('enabled', False))} and model.dtype is {self.model.dtype}",
                    "make them agree: model.dtype bfloat16 with bf16 enabled, float32 with neither bf16 nor fp16",
                )
        if stage == 3 and self.model.quantization:
            raise ConfigError(
                f"the DeepSpeed configuration has zero_optimization.stage 3 and model.quantization is {self.model.quantization}, which it cannot split",
                "use stage 2, or leave the base unquantised",
            )
        if stage == 3:
            self._check_sharded()
        return content

    def check_whole(self) -> None:
        """Refuse to train a whole model whose weights are too coarse for it.

        Raises:
            ConfigError: for a method that would, on quantised weights or on half-precision ones without an optimiser's finer copies.
        """
        for label, method in self.methods.items():
            if METHODS[method.method].whole and self.model.quantization:
                raise ConfigError(
                    f"'{label}' trains the whole model and model.quantization is {self.model.quantization}, but quantised weights can't be trained",
                    f"leave the base unquantised, or '{label}' out of this run",
                )
            if METHODS[method.method].whole and self.model.dtype != "float32" and not method.training.get("deepspeed"):
                raise ConfigError(
                    f"'{label}' trains the whole model and model.dtype is {self.model.dtype}, in which small steps are rounded away",
                    "set model.dtype to float32; training.bf16 computes in bfloat16 all the same",
                )

    def _check_sharded(self) -> None:
        for label, method in self.methods.items():
            if not METHODS[method.method].sharded:
                raise ConfigError(
                    f"the DeepSpeed configuration has zero_optimization.stage 3, and '{label}' ({method.method}) needs what it trains whole outside of its layers",
                    "use stage 2",
                )


def _per_task(training: Mapping[str, Any], key: str, tasks: int) -> list[float]:
    """An argument of `PER_TASK` as it is listed, or the one number for so many tasks."""
    value = training.get(key, PER_TASK[key][0])
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * tasks


def _machine_independent(training: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments by what a step is: batches per device and process by the examples that they are together."""
    kept = {key: value for key, value in training.items() if key not in MACHINE_ARGUMENTS}
    parts = (training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1), os.environ.get("WORLD_SIZE", 1))
    return kept | {"examples_per_step": math.prod(map(int, parts))}


def load_config(name_or_path: str, overrides: typing.Sequence[str] = (), **direct: Any) -> RunConfig:
    """Read a run's YAML, apply dotted overrides, and check every key.

    Args:
        name_or_path: a YAML file, or the name of a shipped configuration (`llava-keeplora list`).
        overrides: `a.b.c=value` strings; the value is read as YAML.
        direct: top-level values that win over both: `output_dir`, `data_root` (sets `data.root`), and `methods`, the labels of those to keep.

    Raises:
        ConfigError: for a missing file, an unknown key, or a value of the wrong type or range.
    """
    return finish_config(read_config(name_or_path), overrides, **direct)


def read_config(name_or_path: str) -> dict[str, Any]:
    """A configuration as plain data, unchecked; see `load_config`."""
    path = find_config(name_or_path)
    try:
        return localize_plugins(read_mapping(path), path.parent)
    except RecipeError as error:
        raise ConfigError(error.problem, error.cure) from error


def finish_config(tree: dict[str, Any], overrides: typing.Sequence[str] = (), **direct: Any) -> RunConfig:
    """Build a `RunConfig` from plain data and what the command line sets; see `load_config`."""
    return parse_config(with_settings(tree, overrides, **direct))


def with_settings(tree: dict[str, Any], overrides: typing.Sequence[str] = (), **direct: Any) -> dict[str, Any]:
    """Plain data with what the command line sets in it; see `load_config`."""
    for override in overrides:
        _apply_override(tree, override)
    if direct.get("data_root"):
        tree["data"] = as_mapping(tree.get("data"), "data") | {"root": direct["data_root"]}
    if direct.get("output_dir"):
        tree["output_dir"] = direct["output_dir"]
    if direct.get("methods") is not None:
        _keep_methods(tree, direct["methods"])
    return tree


def load_recipes(tasks: typing.Sequence[str]) -> list[Recipe]:
    """The recipes of a sequence's tasks.

    Raises:
        RecipeError: if one is not there or cannot be read.
        ConfigError: if two have one name.
    """
    recipes = [load_recipe(task) for task in tasks]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task '{name}' is in the sequence {names.count(name)} times", "name each task once")
    return recipes


def only_methods(methods: Mapping[str, Any], labels: typing.Sequence[str]) -> dict[str, Any]:
    """Of methods by label these alone, in their own order; the row of the untouched model may be named too.

    Raises:
        ConfigError: for a label that is none of theirs.
    """
    labels = [safe_label(label) for label in labels]
    for label in labels:
        if label not in (ZERO_SHOT, *methods):
            raise ConfigError(f"the configuration has no method '{label}'", nearest(label, list(methods)))
    return {label: value for label, value in methods.items() if label in (ZERO_SHOT, *labels)}


def _keep_methods(tree: dict[str, Any], labels: typing.Sequence[str]) -> None:
    """Keep only these methods of a run's configuration, and what is published for them."""
    labels = [safe_label(label) for label in labels]
    tree["methods"] = only_methods(as_mapping(tree.get("methods", DEFAULT_METHODS), "methods"), labels)
    if isinstance(tree.get("expected"), Mapping):
        tree["expected"] = {label: value for label, value in tree["expected"].items() if label in (ZERO_SHOT, *labels)}


def find_config(name_or_path: str) -> Path:
    """The path of a configuration given by file or by shipped name."""
    for path in (Path(name_or_path), SHIPPED / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no configuration '{name_or_path}', neither as a file nor among the shipped ones",
        nearest(name_or_path, [*list_configs(), *list_tables()]),
    )


def list_configs() -> list[str]:
    """Names of the shipped configurations of one run."""
    return sorted({path.stem for path in SHIPPED.glob("*.yaml")} - set(list_tables()))


def list_tables() -> list[str]:
    """Names of the shipped tables of many runs."""
    return sorted(path.stem for path in SHIPPED.glob("table-*.yaml"))


def parse_config(tree: Mapping[str, Any], run_plugins: bool = True) -> RunConfig:
    """Build a `RunConfig` from plain data; see `load_config`.

    Args:
        tree: the configuration.
        run_plugins: whether plug-ins are imported; where not, their options are taken as they are, to look at a run whose plug-ins
            need not be installed.
    """
    tree = localize_plugins(tree)
    for key in TABLE_KEYS:
        if key in tree:
            raise ConfigError(f"the key '{key}' makes this a table of several runs", "run it with `llava-keeplora compare`")
    _check_keys(RunConfig, tree, "")
    parts = {name: as_mapping(value, f"parts.{name}") for name, value in as_mapping(tree.pop("parts", {}), "parts").items()}
    training = as_mapping(tree.pop("training", {}), "training")
    methods = as_mapping(tree.pop("methods", DEFAULT_METHODS), "methods")
    expected = as_mapping(tree.pop("expected", {}), "expected")
    sequence, tasks = tree.get("sequence"), tree.get("tasks")
    if bool(sequence) == bool(tasks):
        raise ConfigError("a run needs either `sequence` or `tasks`" + (", not both" if sequence else ""), "name one of them")
    if sequence:
        loaded = load_sequence(sequence)
        tree["tasks"] = list(loaded.tasks)
        if getattr(loaded, "epochs", None):
            training.setdefault("num_train_epochs", list(loaded.epochs))
    if not isinstance(tree["tasks"], (list, tuple)) or not all(isinstance(task, str) for task in tree["tasks"]):
        raise ConfigError(f"tasks is {tree['tasks']!r}, which is no list of names", "list task names or YAML files")
    if methods.get(ZERO_SHOT) in (None, {}):
        methods.pop(ZERO_SHOT, None)  # It always comes first, asked for or not.
    # The run's own sections first, so that a mistake in them isn't told of the method that inherits it.
    own_parts, own_training = {n: build(PartConfig, v, f"parts.{n}") for n, v in parts.items()}, check_training(training)
    evaluation = build(EvaluationConfig, as_mapping(tree.get("evaluation"), "evaluation"), "evaluation")
    parsed = {
        label: _parse_method(label, as_mapping(value, f"methods.{label}"), parts, training, evaluation, run_plugins)
        for label, value in methods.items()
    }
    config = build(RunConfig, tree, "")
    published = {label: _parse_expected(label, value, parsed) for label, value in expected.items()}
    config = dataclasses.replace(config, parts=own_parts, methods=parsed, training=own_training, expected=published)
    for label in parsed:
        config.trainings(label)
    if run_plugins:
        config.deepspeed()
        config.check_whole()
    return config


def _parse_method(
    label: str, tree: dict[str, Any], parts: dict[str, dict], training: dict[str, Any], evaluation: EvaluationConfig,
    run_plugins: bool = True,
) -> MethodConfig:
    """A method inherits the run's parts and training and overrides what it names."""
    where = f"methods.{label}"
    if not isinstance(label, str) or not LABEL.fullmatch(label) or label in RUN_FILES:
        raise ConfigError(f"methods has the label '{label}', which cannot be a folder of the run", "use letters, digits, '-', '_', '.' and '+'")
    if len(label) > MAX_NAME:
        raise ConfigError(f"methods has a label of {len(label)} characters, and a folder is named after it", f"use {MAX_NAME} at most")
    name = tree.pop("method", label)
    name = name if isinstance(name, str) else str(name)
    cls = _find_method(name, where) if run_plugins or not METHODS.is_plugin(name) else None
    if ZERO_SHOT in (label, name):
        raise ConfigError(f"{where} sets something for '{ZERO_SHOT}', which has no settings and always comes first", f"remove {where}")
    own_parts = as_mapping(tree.pop("parts", {}), f"{where}.parts")
    for part in own_parts:
        if parts and part not in parts:
            raise ConfigError(f"{where}.parts names '{part}', which the run does not adapt", nearest(str(part), parts))
    adapts = bool(own_parts) if cls is None else cls.adapts
    if own_parts and not adapts:
        raise ConfigError(f"{where}.parts is set, but '{name}' has no adapters on the model's parts", f"remove {where}.parts")
    inherited = parts if adapts else {}
    merged = {n: {**inherited.get(n, {}), **as_mapping(own_parts.get(n, {}), f"{where}.parts.{n}")} for n in {**inherited, **own_parts}}
    own_training = as_mapping(tree.pop("training", {}), f"{where}.training")
    read = {"test_prompts": tree.pop("test_prompts")} if "test_prompts" in tree else {}
    test_prompts = build(EvaluationConfig, read, where).test_prompts if read else evaluation.test_prompts
    crop = _coerce(tree.pop("random_resized_crop", None), tuple[float, float] | None, f"{where}.random_resized_crop")
    keys = ("method", "parts", "training", *ROW_KEYS)
    options = tree if cls is None else dataclasses.asdict(build(cls.Options, tree, where, also=keys))
    facts = dict(
        label=label,
        method=name,
        options=options,
        parts={n: build(PartConfig, v, f"{where}.parts.{n}") for n, v in merged.items()},
        training=check_training(training) | check_training(own_training, f"{where}.training"),
        test_prompts=test_prompts,
        random_resized_crop=crop,
    )
    try:
        return MethodConfig(**facts)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.problem}", error.cure) from None


def _find_method(name: str, where: str) -> type:
    """Return the class of a method, a plug-in's imported.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    try:
        return METHODS[name]
    except UnknownNameError as error:
        raise ConfigError(f"{where} names the method '{name}', which does not exist", error.cure) from None
    except PluginError as error:
        raise ConfigError(f"{where}: {error.problem}", error.cure) from error


def _parse_expected(label: str, tree: Any, methods: Mapping[str, MethodConfig]) -> ExpectedConfig:
    """What was published for a row that the run has."""
    rows = (ZERO_SHOT, *methods)
    if label not in rows:
        raise ConfigError(f"expected names the row '{label}', which the run does not have", nearest(str(label), rows))
    return build(ExpectedConfig, as_mapping(tree, f"expected.{label}"), f"expected.{label}")


def check_training(tree: Mapping[str, Any], where: str = "training") -> dict[str, Any]:
    """Check names and types of `training` against `transformers.TrainingArguments`.

    Args:
        tree: its keys and values.
        where: the dotted place, for error texts.
    """
    from transformers import TrainingArguments

    fields = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    hints = typing.get_type_hints(TrainingArguments)
    out = {}
    for key, value in tree.items():
        if key in DRIVER_ARGUMENTS:
            raise ConfigError(f"{where}.{key} belongs to the driver", DRIVER_ARGUMENTS[key])
        if key not in fields:
            hint = nearest(str(key), fields)
            if not hint.startswith("did you mean"):
                hint = "https://huggingface.co/docs/transformers/main_classes/trainer lists them"
            raise ConfigError(f"{where}.{key} is not an argument of transformers.TrainingArguments", hint)
        if isinstance(value, (list, tuple)) and key in PER_TASK:
            out[key] = [_coerce(v, float, f"{where}.{key}") for v in value]
        else:
            out[key] = _coerce(value, hints[key], f"{where}.{key}")
        if key in WITHOUT and out[key] not in WITHOUT[key][0]:
            raise ConfigError(f"{where}.{key} is {value!r}, which the driver's training does without", WITHOUT[key][1])
    if out.get("weight_decay", 0.0) < 0:
        raise ConfigError(f"{where}.weight_decay is {out['weight_decay']}, but weights do not grow", "give a number from 0 on")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if out.get(key, 1) < 1:
            raise ConfigError(f"{where}.{key} is {out[key]}, but a step is made of something", "give a whole number from 1 on")
    if isinstance(out.get("deepspeed"), str):
        read_deepspeed(Path(out["deepspeed"]), f"{where}.deepspeed")
    return out


def read_deepspeed(path: Path, where: str) -> dict[str, Any]:
    """The content of a DeepSpeed configuration.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        content = parse_json(decode_text(path.read_bytes()))
        # Plain data from here on: json.dumps would write what JSON has no word for.
        json.dumps(content, allow_nan=False)
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{where} names '{path}', which {why}", "give the path of a DeepSpeed configuration in JSON") from error
    return as_mapping(content, where)


def build(kind: type, tree: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> Any:
    """Build a dataclass from a mapping; unknown keys and wrong types are errors.

    Args:
        kind: the dataclass.
        tree: its values; absent ones take the default.
        where: the dotted place, for error texts.
        also: valid names beside the fields, for the hint.
    """
    _check_keys(kind, tree, where, also)
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = build(hint, as_mapping(value, f"{prefix}{key}"), f"{prefix}{key}")
        else:
            values[key] = _coerce(value, hint, f"{prefix}{key}")
    try:
        return kind(**values)
    except UserError as error:
        raise ConfigError(f"{prefix}{error.problem}", error.cure) from None


def _check_keys(kind: type, tree: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> None:
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise ConfigError(f"unknown key '{where}{'.' if where else ''}{key}'", nearest(str(key), fields | set(also)))


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Cast YAML scalars to a field's type; refuse what does not fit, and numbers that are not finite."""
    options = [h for h in typing.get_args(hint) if h is not type(None)] if _is_union(hint) else [hint]
    if value is None and (_is_union(hint) and type(None) in typing.get_args(hint)):
        return None
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    for option in options:
        origin = typing.get_origin(option) or option
        try:
            if origin is bool and isinstance(value, bool):
                return value
            # Where text fits as well, `no` is the text: `save_strategy: no`.
            if origin is bool and str not in options and isinstance(value, str) and value.lower() in SWITCHES:
                return SWITCHES[value.lower()]
            if origin is int and not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, str) and value.lstrip("-").isdigit())):
                return int(value)
            if origin is float and not isinstance(value, bool) and isinstance(value, (int, float, str)) and math.isfinite(float(value)):
                return float(value)
            if origin is str and isinstance(value, str):
                return value
            if origin is tuple and isinstance(value, (list, tuple)):
                return tuple(value)
            if origin in (list, dict) and isinstance(value, origin):
                return value
        except (ValueError, OverflowError):
            continue
    if all((typing.get_origin(o) or o) in (bool, int, float, str, tuple, list, dict) for o in options):
        raise ConfigError(f"{where} is {value!r}, but it takes {names}", "mend the value")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """A section of a configuration; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, but it takes `key: value` pairs", "mend the value")
    return dict(value)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"the override '{override}' is not of the form key.subkey=value", "write, for instance, training.learning_rate=5e-4")
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"the override '{override}' names a key {len(parents) + 1} levels deep", "name a key that the configuration has")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"the override '{override}' reaches into '{parent}', which holds {child!r}", "name a key that holds a mapping")
        node = child
    try:
        node[leaf] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"the override '{override}' has a value that {error}", "correct the value, or put quotes around text") from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as JSON text, as the run folder keeps it; what was published, or is found elsewhere, is no part of a run."""
    # Recipes are found from any working directory.
    tasks = [str(Path(task).expanduser().absolute()) if is_file_name(task) else task for task in config.tasks]
    tree = dataclasses.asdict(config) | {"tasks": tasks}
    del tree["expected"], tree["base_cache"]
    # In the order given: methods appear in tables as the user listed them.
    return json.dumps(tree, indent=2) + "\n"


def read_dumped(run: Path) -> dict[str, Any]:
    """The resolved configuration that a run folder keeps; see `dump_config`.

    Raises:
        RunError: if the folder is no run's, or its configuration was damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        raise RunError(f"{run} is not a run folder (it has no config.json)", "name the output_dir of a run")
    return read_record(path)
