"""Whether a run was measured as published figures were: their model, tasks, data, tests and settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_keeplora.config import MACHINE_ARGUMENTS, ZERO_SHOT, ExpectedConfig, RunConfig
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.run_folder import SCORES, VERSIONS, WARN, read_record, task_files
from llava_keeplora_recipes import Recipe, load_recipe, load_recipes, load_sequence
from llava_keeplora_recipes.errors import RecipeError

#: Training arguments that change how the same steps are computed; the examples of a step are compared apart.
SAME_STEPS = {*MACHINE_ARGUMENTS, "use_cpu", "fp16", "bf16", "tf32", "gradient_checkpointing_kwargs"}
SAME_STEPS |= {"disable_tqdm", "logging_steps", "logging_strategy", "logging_first_step", "save_total_limit"}
#: Keys of a recipe that say what its examples, questions and scores are, wherever its files are.
CONTENT = (
    *("kind", "metric", "prompt", "test_prompt", "instruction", "evaluate"),
    *("classes", "num_classes", "class_names", "expected_sizes"),
)
#: Keys of `model` and `data` with a clause of their own, or that change how the same numbers are computed.
SAME_MODEL = {"name_or_path", "quantization", "attn_implementation", "object"}
SAME_DATA = {"root", "holdout", "train_examples", "cache_gb"}
#: Value of a method's `routing` that makes an answer depend on the other images of its test batch.
BATCH = "batch"
#: Most keys that a clause names.
NAMED = 4


@dataclass(frozen=True)
class Measured:
    """What a finished run was measured on, as its folder says.

    Args:
        examples: task → number of its test examples; without tasks of which it is not recorded.
        processes: number of processes that trained.
    """

    examples: Mapping[str, int] = field(default_factory=dict)
    processes: int = 1


def read_measured(run: Path) -> Measured:
    """Read what a run folder records of its tests and processes.

    Raises:
        RunError: if a record is damaged.
    """
    records = [read_record(path) for path in task_files(run / ZERO_SHOT, SCORES)]
    examples = {task: score["n"] for scores in records for task, score in scores.items() if "n" in score}
    path = run / VERSIONS
    versions = read_record(path) if path.exists() else {}
    return Measured(examples, int(versions.get("processes", 1)))


def check_expected(config: RunConfig) -> None:
    """Check before a run that it will have every expected figure, and that sequences are there.

    Raises:
        ConfigError: if the last score of a task is expected that is neither in the run's sequence nor in that
            of the figures, or there is no such sequence.
    """
    names = [recipe.name for recipe in load_recipes(config.tasks)]
    for label, published in config.expected.items():
        try:
            known = [*names, *(load_sequence(published.sequence).tasks if published.sequence else ())]
        except RecipeError as error:
            raise ConfigError(f"expected.{label}.sequence: {error.problem}", error.cure) from None
        for task in published.last:
            if task not in known and not published.not_comparable:
                raise ConfigError(
                    f"expected.{label}.last names '{task}', which is no task of the run", nearest(task, names)
                )


def differences(
    config: RunConfig, measured: Measured, written: RunConfig | None = None
) -> dict[str, list[str]]:
    """Return, for every row of `expected`, why its published figures do not compare with the run's.

    Args:
        config: the run's configuration.
        measured: what the run was measured on.
        written: the configuration without what the command line changed; what is changed there is no longer
            the published setting.

    Returns:
        label → clauses, none for figures that compare.
    """
    written, recipes = written or config, load_recipes(config.tasks)
    names, own = [recipe.name for recipe in recipes], load_recipes(written.tasks)
    shipped = dict(_changed_recipes(recipes, measured)) if config.expected else {}
    changed = dict(_changed_from(recipes, own))
    return {
        label: [published.not_comparable]
        if published.not_comparable
        else [
            *_model(config, published, written),
            *_tasks(names, published, [recipe.name for recipe in own]),
            *_data(config, shipped if published.sequence else changed, written),
            *_tests(config, label, published, written),
            *_test_batches(config, label, measured, written),
            *_settings(config, label, measured, written),
            *_seeds(published),
        ]
        for label, published in config.expected.items()
    }


def _model(config: RunConfig, published: ExpectedConfig, written: RunConfig) -> Iterator[str]:
    name, base = config.model.name_or_path, published.model or written.model.name_or_path
    if name != base:
        yield f"other base model ({name} instead of {base})"
    if config.model.quantization != written.model.quantization:
        yield f"other base model (quantised to {config.model.quantization})"
    changed = _changed_fields(config.model, written.model, SAME_MODEL)
    if changed:
        yield f"other base model (another {_list([f'model.{key}' for key in changed])})"


def _tasks(names: list[str], published: ExpectedConfig, own: list[str]) -> Iterator[str]:
    """Yield a clause if the run does not learn the tasks of the figures in their order.

    Args:
        names: the run's tasks.
        published: the figures.
        own: tasks of figures that name no sequence, those of the configuration as it is written.
    """
    sequence = load_sequence(published.sequence) if published.sequence else None
    tasks, not_scored = (list(sequence.tasks), sequence.not_scored) if sequence else (own, ())
    missing = [*(task for task in tasks if task not in names), *not_scored]
    added = [name for name in names if name not in tasks]
    if missing:
        yield f"missing tasks ({_list(missing)})"
    if added:
        yield f"other tasks ({_list(added)})"
    if not missing and not added and names != tasks:
        yield "another order of tasks"


def _data(config: RunConfig, changed: Mapping[str, str], written: RunConfig) -> Iterator[str]:
    if config.data.holdout:
        yield f"other data (scored on {config.data.holdout:g} of the training data)"
    if config.data.train_examples:
        yield f"other data (about {config.data.train_examples} training examples of each task)"
    keys = _changed_fields(config.data, written.data, SAME_DATA)
    if keys:
        yield f"other data (another {_list([f'data.{key}' for key in keys])})"
    if changed:
        more = f", and {len(changed) - 1} more of the tasks" if len(changed) > 1 else ""
        yield f"other data ({next(iter(changed.values()))}{more})"


def _changed_recipes(recipes: Sequence[Recipe], measured: Measured) -> Iterator[tuple[str, str]]:
    """Yield (task, how it differs) for tasks that are not those of the package's recipes of their names."""
    for recipe in recipes:
        try:
            shipped = load_recipe(recipe.name)
        except RecipeError:
            continue
        changed = _changed(_content(recipe), _content(shipped))
        expected, found = shipped.expected_sizes.get("test"), measured.examples.get(recipe.name)
        if changed:
            yield recipe.name, f"{recipe.name} has another {_list(changed)}"
        elif expected and found and expected != found:
            yield recipe.name, f"{recipe.name} has {found} test examples instead of {expected}"


def _changed_from(recipes: Sequence[Recipe], written: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    """Yield (task, how it differs) for tasks whose recipes are not those of the same names as written."""
    before = {recipe.name: recipe for recipe in written}
    for recipe in recipes:
        if recipe.name in before and (changed := _changed(_content(recipe), _content(before[recipe.name]))):
            yield recipe.name, f"{recipe.name} has another {_list(changed)}"


def _content(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in CONTENT}


def _tests(config: RunConfig, label: str, published: ExpectedConfig, written: RunConfig) -> Iterator[str]:
    now, then = ((run.methods.get(label) or run.evaluation).test_prompts for run in (config, written))
    if now != (published.test_prompts or then):
        yield f"other protocol (test_prompts {now} instead of {published.test_prompts or then})"
    keys = ("max_new_tokens", "generation")
    changed = [key for key in keys if getattr(config.evaluation, key) != getattr(written.evaluation, key)]
    if changed:
        yield f"other protocol (another evaluation.{_list(changed)})"


def _test_batches(config: RunConfig, label: str, measured: Measured, written: RunConfig) -> Iterator[str]:
    """Yield a clause if a row that chooses one route per batch is tested in other batches.

    Processes divide a test split, so that their number changes the batches too.
    """
    if label not in config.methods or config.methods[label].options.get("routing") != BATCH:
        return
    now, then = (run.evaluation.batch_size for run in (config, written))
    if (now, measured.processes) != (then, 1):
        processes = f"{measured.processes} process{'es' * (measured.processes > 1)}"
        yield (
            f"other protocol (tested in batches of {now} in {processes}, but in batches of {then} in 1 "
            "process there, and routes depend on it)"
        )


def _settings(config: RunConfig, label: str, measured: Measured, written: RunConfig) -> Iterator[str]:
    """Yield a clause if the row is not trained as the configuration has it."""
    if label not in config.methods or label not in written.methods:
        return
    now, then = (_row(run, label) for run in (config, written))
    changed = _changed(now, then)
    if changed:
        yield f"other settings ({_list(changed)})"
    batch, meant = _batch(config, label) * measured.processes, _batch(written, label)
    if batch != meant:
        yield f"other settings ({batch} examples per step instead of {meant})"


def _row(config: RunConfig, label: str) -> dict[str, Any]:
    """Return dotted key → value of all settings on which a row's updates depend.

    `memory.statistics_gb` is none of them: it belongs to the machine, and changes only how near a sketch is
    to the exact statistics, with an error that the run records.
    """
    row = dataclasses.asdict(config.methods[label])
    del row["test_prompts"]
    row["training"] = {key: value for key, value in row["training"].items() if key not in SAME_STEPS}
    row |= row.pop("options")
    flat: dict[str, Any] = {}

    def flatten(prefix: str, tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                flatten(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    flatten("", row)
    # A guard that only warns changes no update.
    acts = config.guard and config.guard.on_failure != WARN
    return flat | {"adopted": config.adopted, "guard": dataclasses.asdict(config.guard) if acts else None}


def _batch(config: RunConfig, label: str) -> int:
    """Return the examples of an optimiser step in one process."""
    training = config.methods[label].training
    return training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)


def _seeds(published: ExpectedConfig) -> Iterator[str]:
    if published.seeds not in (None, 1):
        yield f"other number of seeds (1 instead of {published.seeds})"


def _changed_fields(now: Any, then: Any, same: Collection[str]) -> list[str]:
    """Return the keys of which two records have different values, but for those of `same`."""
    changed = _changed(dataclasses.asdict(now), dataclasses.asdict(then))
    return [key for key in changed if key not in same]


def _changed(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Return the keys of which two mappings have different values."""
    keys = dict.fromkeys([*then, *now])
    return [key for key in keys if _text(now.get(key)) != _text(then.get(key))]


def _text(value: Any) -> str:
    """Return a value as text that is the same for lists and tuples."""
    return json.dumps(value, sort_keys=True, default=str)


def _list(names: list[str]) -> str:
    """Return the first names and the number of the others."""
    return ", ".join([*names[:NAMED], *([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])])
