"""Scores of a model with the principal or the residual part of its weights alone.

Source: KeepLoRA (arXiv 2601.19659), figure 1: general knowledge lies in the principal subspace of the
weights, domain-specific knowledge in the residual one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from llava_keeplora.analysis.results import ALL, Knowledge, Point
from llava_keeplora.analysis.svd_split import SIDES, SvdSplit, every_layer
from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import DTYPES, Family, Prepared, open_model
from llava_keeplora_eval import predict_to_file, score
from llava_keeplora_eval.predictors import default_device
from llava_keeplora_recipes import TaskData, load_recipe, load_split

GROUPS = ("general", "specific")
ENERGIES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)


def analyze_model(
    model: ModelConfig,
    groups: Mapping[str, Sequence[str]],
    *,
    energies: Sequence[float] = ENERGIES,
    examples: int = 500,
    evaluation: EvaluationConfig = EvaluationConfig(),
    data_root: str | None = None,
) -> Knowledge:
    """Score a model with the principal part of its weights alone, and with the residual part alone.

    Args:
        model: the model to load.
        groups: `general` and `specific` → names or files of recipes.
        energies: shares of the weights' energy in the principal part.
        examples: the largest number of examples of each task's test split, evenly spaced.
        evaluation: settings of prediction.
        data_root: the folder with the data sets.

    Raises:
        ConfigError: an energy is outside (0, 1), or a task is named twice or can't be done by the model.
        RecipeError: a recipe or its data are not valid.
    """
    energies = _check_arguments(energies, groups, examples)
    family = open_model(model, evaluation)
    data = {group: _load(family, tasks, examples, data_root) for group, tasks in groups.items()}
    all_data = [split for splits in data.values() for split in splits]
    _check_names([split.recipe.name for split in all_data])
    family.load(DTYPES[model.dtype])
    if not family.quantization:  # A quantised model is on its device already.
        family.model.to(default_device())
    whole, points = _score_splits(family, all_data, energies, evaluation.batch_size)
    tasks = {group: {split.recipe.name: _record(split) for split in splits} for group, splits in data.items()}
    return Knowledge(asdict(model), tasks, whole, points)


def _score_splits(
    family: Family, tasks: Sequence[TaskData], energies: Sequence[float], batch_size: int
) -> tuple[dict[str, float], list[Point]]:
    """Return the unchanged model's scores, and a point for every part, energy and side of the weights."""
    parts = every_layer(family)
    if len(parts) > 1:
        parts = parts | {ALL: {name: layer for layers in parts.values() for name, layer in layers.items()}}
    points = []
    total = 1 + len(parts) * len(energies) * len(SIDES)
    with tqdm(total=total, desc="analyze", delay=2, disable=None) as bar:
        whole = _scores(family, tasks, batch_size)
        bar.update()
        for part, layers in parts.items():
            for energy in energies:
                split = SvdSplit(layers, energy)
                for side in SIDES:
                    with split.only(side):
                        scores = _scores(family, tasks, batch_size)
                    points.append(Point(part, energy, side, split.directions, scores))
                    bar.update()
    return whole, points


def _check_arguments(
    energies: Sequence[float], groups: Mapping[str, Sequence[str]], examples: int
) -> list[float]:
    for energy in energies:
        if not 0.0 < energy < 1.0:
            raise ConfigError(
                f"--energies has {energy}, but a weight is cut at a share of its energy between 0 and 1",
                "give shares such as 0.5,0.9",
            )
    for group in GROUPS:
        if not groups.get(group):
            raise ConfigError(f"there are no {group} tasks", f"name at least one with --{group}")
    if examples < 1:
        raise ConfigError(f"--examples is {examples}, but a score is taken on something", "give 1 or more")
    return sorted(set(energies))


def _load(family: Family, tasks: Sequence[str], examples: int, data_root: str | None) -> list[TaskData]:
    splits = []
    for task in tasks:
        data = load_split(load_recipe(task), "test", data_root)
        recipe = data.recipe
        if recipe.kind not in family.kinds:
            raise ConfigError(
                f"task '{recipe.name}' is {recipe.kind}, and this model does {', '.join(family.kinds)} only",
                "leave the task out",
            )
        count = min(examples, len(data))
        splits.append(data.take(i * len(data) // count for i in range(count)))
        family.check(splits[-1])
    return splits


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"task '{name}' is named {names.count(name)} times",
                "name each task once, as general or as specific",
            )


def _scores(family: Family, tasks: Sequence[TaskData], batch_size: int) -> dict[str, float]:
    """Return task → score in percent of the model as it is now."""
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in tasks:
            path = Path(folder) / f"{len(scores)}.jsonl"
            predict_to_file(
                family.predictor(data.recipe, Prepared(family, data)),
                data,
                path,
                batch_size,
                advance=lambda count: None,
            )
            scores[data.recipe.name] = score(data, path).score
    return scores


def _record(data: TaskData) -> dict[str, object]:
    return {"n": len(data), "metric": data.recipe.metric, "fingerprint": data.fingerprint}
