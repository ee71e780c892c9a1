"""Which part of its weights a model's general and specific abilities need.

Principal directions or the residual ones.

Source: KeepLoRA (arXiv 2601.19659), figure 1: general knowledge lies in the principal subspace of the
weights, what is specific to a domain in the residual one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llava_keeplora.analysis.svd_split import KEPT, SIDES, SvdSplit, every_layer
from llava_keeplora.analysis.writers import made, write_knowledge
from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import DTYPES, Family, Prepared, open_model
from llava_keeplora_eval import predict_to_file, score
from llava_keeplora_eval.predictors import default_device
from llava_keeplora_recipes import TaskData, load_recipe, load_split

GROUPS = ("general", "specific")
ENERGIES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
#: All parts of a model together.
ALL = "all parts"


@dataclass(frozen=True)
class Point:
    """The model with one side of the weights of one part.

    Args:
        part: of the model, or `ALL`; the others keep their whole weights.
        energy: share of each weight's energy in its principal part.
        side: `principal` or `residual`, what is left of the weights.
        directions: share of the input directions that the principal parts take.
        scores: task → score in percent.
    """

    part: str
    energy: float
    side: str
    directions: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Knowledge:
    """What the analysis of a model found.

    Args:
        model: its name and form, as a configuration has them.
        tasks: group → task → number of examples, metric and fingerprint of the data.
        whole: task → score in percent of the untouched model.
        points: all cuts.
    """

    model: Mapping[str, object]
    tasks: Mapping[str, Mapping[str, Mapping[str, object]]]
    whole: Mapping[str, float]
    points: Sequence[Point]

    @property
    def parts(self) -> list[str]:
        """The parts that were cut, in order."""
        return list(dict.fromkeys(point.part for point in self.points))

    def mean(self, group: str, scores: Mapping[str, float]) -> float:
        """The mean score of a group's tasks."""
        return statistics.fmean(scores[task] for task in self.tasks[group])

    def line(self, part: str, side: str, group: str) -> list[tuple[float, float]]:
        """(energy, mean score of a group) along the energies."""
        return sorted(
            (p.energy, self.mean(group, p.scores)) for p in self.points if (p.part, p.side) == (part, side)
        )

    @property
    def proposals(self) -> dict[str, float | None]:
        """Part → its `proposal`."""
        return {part: self.proposal(part) for part in self.parts if part != ALL}

    def proposal(self, part: str) -> float | None:
        """ε_w from the data.

        The smallest energy from which on the principal parts alone keep the general score up to `KEPT`; None
        if none does.
        """
        enough = KEPT * self.mean("general", self.whole)
        found = None
        for energy, value in reversed(self.line(part, "principal", "general")):
            if value < enough:
                break
            found = energy
        return found

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self) | {"energy_weight": self.proposals, "kept": KEPT}


def analyze_model(
    model: ModelConfig,
    groups: Mapping[str, Sequence[str]],
    into: str | Path,
    *,
    energies: Sequence[float] = ENERGIES,
    examples: int = 500,
    evaluation: EvaluationConfig = EvaluationConfig(),
    data_root: str | None = None,
) -> Knowledge:
    """Score a model cut down to the principal and to the residual part of its weights.

    Tables and plots are written.

    Args:
        model: which one.
        groups: `general` and `specific` → names or files of recipes.
        into: the folder to write to, made when missing.
        energies: shares of the weights' energy to cut at.
        examples: the most of each task's test split, evenly spaced.
        evaluation: how predictions are made.
        data_root: the folder with the data sets.

    Raises:
        ConfigError: for energies outside (0, 1), tasks named twice, or tasks that the model can't answer.
        RecipeError: for whatever is wrong with a recipe or its data.
    """
    energies = _checked(energies, groups, examples)
    family = open_model(model, evaluation)
    data = {group: _load(family, tasks, examples, data_root) for group, tasks in groups.items()}
    every = [one for tasks in data.values() for one in tasks]
    _check_names([one.recipe.name for one in every])
    with made(into) as room:
        family.load(DTYPES[model.dtype])
        if not family.quantization:  # What is quantised was loaded to where it is.
            family.model.to(default_device())
        layers = every_layer(family)
        parts = layers | (
            {ALL: {name: layer for own in layers.values() for name, layer in own.items()}}
            if len(layers) > 1
            else {}
        )
        points = []
        with tqdm(
            total=1 + len(parts) * len(energies) * len(SIDES), desc="analyze", delay=2, disable=None
        ) as bar:
            whole = _scores(family, every, evaluation.batch_size)
            bar.update()
            for part, own in parts.items():
                for energy in energies:
                    cuts = SvdSplit(own, energy)
                    for side in SIDES:
                        with cuts.only(side):
                            points.append(
                                Point(
                                    part,
                                    energy,
                                    side,
                                    cuts.directions,
                                    _scores(family, every, evaluation.batch_size),
                                )
                            )
                        bar.update()
        found = Knowledge(
            asdict(model),
            {group: {one.recipe.name: _record(one) for one in tasks} for group, tasks in data.items()},
            whole,
            points,
        )
        write_knowledge(found, room)
    return found


def _checked(energies: Sequence[float], groups: Mapping[str, Sequence[str]], examples: int) -> list[float]:
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
    found = []
    for task in tasks:
        data = load_split(load_recipe(task), "test", data_root)
        recipe = data.recipe
        if recipe.kind not in family.kinds:
            raise ConfigError(
                f"task '{recipe.name}' is {recipe.kind}, and this model does {', '.join(family.kinds)} only",
                "leave the task out",
            )
        count = min(examples, len(data))
        found.append(data.take(i * len(data) // count for i in range(count)))
        family.check(found[-1])
    return found


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"task '{name}' is named {names.count(name)} times",
                "name each task once, as general or as specific",
            )


def _scores(family: Family, tasks: Sequence[TaskData], batch_size: int) -> dict[str, float]:
    """Task → score in percent of the model as it is now."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in tasks:
            path = Path(folder) / f"{len(found)}.jsonl"
            predict_to_file(
                family.predictor(data.recipe, Prepared(family, data)),
                data,
                path,
                batch_size,
                advance=lambda count: None,
            )
            found[data.recipe.name] = score(data, path).score
    return found


def _record(data: TaskData) -> dict[str, object]:
    return {"n": len(data), "metric": data.recipe.metric, "fingerprint": data.fingerprint}
