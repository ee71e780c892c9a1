"""The recipe: what a task is, as a declarative, versioned and fingerprinted record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest
from .placeholders import place_images
from .readers import KINDS, READERS
from .recipe_rules import FROM_SOURCE, KEYS, REQUIRED, check_recipe
from .registry import Registry
from .rendered import RENDERED
from .rendered_scenes import SCENES
from .strict_yaml import check_keys, dump_yaml, list_shipped, read_mapping, resolve

RECIPES = Path(__file__).parent / "recipes"
#: How a metric from elsewhere is named; the metrics themselves are `llava_keeplora_eval`'s.
METRIC_NAMES = Registry("metric", "llava_keeplora.metrics", {})

# The question to a generative model where a classification recipe has no instruction of its own; the second
# sentence is LLaVA-1.5's for short answers (Liu et al., 2024, arXiv:2310.03744).
ASKS = "What is shown in the image?\nAnswer the question using a single word or phrase."

# A corrected citation must not change a task's identity, nor must the place of its files, nor test prompts:
# a task is read with them only where a run says so, and the run then records them.
NOT_IDENTITY = (
    "licence",
    "homepage",
    "citation",
    "description",
    "seen_by",
    "folder",
    "expected_sizes",
    "test_prompts",
)


@dataclass(frozen=True)
class Recipe:
    """What a task is: its prompt, classes, metric, and where its examples come from.

    Attributes:
        name: the task's name, for example `digits` or `mtil/aircraft`.
        version: raised whenever the examples, the classes or the prompt change.
        kind: `classification`, `vqa` or `captioning`.
        metric: how answers are scored, for example `accuracy`, or `my_metrics.py:my_metric` beside the YAML.
        licence: the licence of the data.
        source: `format` and what that format needs (`path`, `columns`, ...); see `readers`.
        splits: our split name to the source's file, folder or split name.
        prompt: for classification a caption with `{c}` for the class; for vqa an optional text
            around the question, `{q}`; for captioning the instruction, unless the source has one.
        test_prompt: for vqa, takes the place of `prompt` in the split `test`; a mapping from the first
            reference answer to a prompt (`other` for the rest) where an official runner does that.
        test_prompts: for classification, captions with `{c}` whose text features are averaged where a test
            asks for that, as CLIP's own tests do (Radford et al., 2021, section 3.1.4); `prompt` alone where
            there are none.
        instruction: for classification, what a generative model is asked; see `asks`.
        classes: class names in label order, as answers are scored; empty where the kind has none,
            None while they are still unread from the source (`classes: from-source`).
        num_classes: number of classes that the source must have.
        class_names: the source's label to our class, where the two differ.
        homepage, citation, description: where the data comes from.
        seen_by: models whose pre-training saw the `pretrain` split.
        expected_sizes: number of examples per split in the published protocol.
        background: `#rrggbb`, what is seen through transparent pixels; white where it is None.
        folder: folder of a user's YAML, where relative paths start without a data root.
    """

    name: str
    version: int
    kind: str
    metric: str
    licence: str
    source: dict[str, Any]
    splits: dict[str, Any]
    prompt: str | None = None
    test_prompt: str | dict[str, str] | None = None
    test_prompts: list[str] = field(default_factory=list)
    instruction: str | None = None
    classes: list[str] | None = field(default_factory=list)
    num_classes: int | None = None
    class_names: dict[str, str] = field(default_factory=dict)
    homepage: str = ""
    citation: str = ""
    description: str = ""
    seen_by: list[str] = field(default_factory=list)
    expected_sizes: dict[str, int] = field(default_factory=dict)
    background: str | None = None
    folder: Path | None = field(default=None, compare=False)

    @property
    def prompts(self) -> list[str]:
        """The prompt of every class in label order, with underscores as spaces.

        For errors see `class_prompts`.
        """
        return self.class_prompts(self.prompt)

    def class_prompts(self, template: str) -> list[str]:
        """A caption of every class in label order, with underscores as spaces.

        Args:
            template: the caption, with `{c}` for the class; for instance one of `test_prompts`.

        Raises:
            RecipeError: the task has no classes, or they are not read from its source yet.
        """
        if self.kind != "classification":
            raise RecipeError(
                f"recipe '{self.name}' is {self.kind} and has no class prompts", "ask a classification recipe"
            )
        if self.classes is None:
            raise RecipeError(
                f"the classes of '{self.name}' are read from its data, which is not loaded yet",
                "load a split and use the recipe that comes with it: load_split(recipe, 'train', "
                "data_root).recipe",
            )
        # replace, not format: a class or a prompt may hold other braces
        return [template.replace("{c}", c.replace("_", " ")) for c in self.classes]

    @property
    def vlm_prompt(self) -> str:
        """The question that a generative model is asked on every example of a classification task.

        Raises:
            RecipeError: the task is of another kind.
        """
        if self.kind != "classification":
            raise RecipeError(
                f"recipe '{self.name}' is {self.kind}, where every example has its own question",
                "read 'question' of the example",
            )
        return (
            ASKS
            if self.instruction is None
            else place_images(self.instruction, 1, f"the instruction of '{self.name}'")
        )

    @property
    def metric_name(self) -> str:
        """The metric's name without a path of this machine: of one in a file `module:object`."""
        return METRIC_NAMES.portable_name(self.metric)

    @property
    def format_name(self) -> str:
        """The source's format without a path of this machine: of a reader in a file `module:Object`."""
        return READERS.portable_name(self.source["format"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of all that decides what a model sees and how it is scored."""
        facts = {k: v for k, v in asdict(self).items() if k not in NOT_IDENTITY}
        for key in ("instruction", "test_prompt", "background"):
            if facts[key] is None:
                del facts[key]  # as before there were any, so that older files keep their recipe
        facts["metric"] = self.metric_name
        facts["source"] = {k: v for k, v in self.source.items() if k != "path"} | {"format": self.format_name}
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return list_shipped(RECIPES)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe that comes with the package, or a user's own YAML.

    A user's YAML may start with `extends: NAME` and give only what differs from that recipe.

    Args:
        name_or_path: a name from `list_recipes()`, or the path of a `.yaml` file.

    Raises:
        RecipeError: there is no such recipe, or the file says something that is not understood.
    """
    path, shipped = resolve(name_or_path, RECIPES, "recipe")
    facts = _read(path, seen=())
    facts = _with_rendered(facts, path)
    missing = [k for k in REQUIRED if k not in facts]
    if missing:
        raise RecipeError(f"{path.name} lacks the key '{missing[0]}'", f"add '{missing[0]}:' to {path}")
    check_recipe(facts, path)
    if facts.get("classes") == FROM_SOURCE:
        facts["classes"] = None
    return Recipe(**facts, folder=None if shipped else path.parent.absolute())


def load_recipes(names_or_paths: Sequence[str | Path]) -> list[Recipe]:
    """Load the recipes of a sequence's tasks.

    Raises:
        RecipeError: one is not there or cannot be read, or two have the same name.
    """
    recipes = [load_recipe(task) for task in names_or_paths]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"task '{name}' is in the sequence {names.count(name)} times", "name each task once"
            )
    return recipes


def flat_recipe(path: str | Path) -> str:
    """A user's recipe as YAML that needs no other file: the keys of the recipes that it extends are in it.

    Args:
        path: the `.yaml` file.

    Raises:
        RecipeError: there is no such file, or it says something that is not understood.
    """
    return dump_yaml(_read(resolve(path, RECIPES, "recipe")[0], seen=()))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The YAML's keys over those of the recipe that it extends."""
    facts = read_mapping(path)
    check_keys(facts, KEYS, path)
    if "metric" in facts:
        facts["metric"] = METRIC_NAMES.localize(facts["metric"], path.parent)
    if isinstance(facts.get("source", {}).get("format"), str):
        facts["source"] = facts["source"] | {
            "format": READERS.localize(facts["source"]["format"], path.parent)
        }
    parent = facts.pop("extends", None)
    if parent is None:
        return facts
    if path in seen:
        raise RecipeError(f"{path.name} extends itself", f"remove 'extends' from {path}")
    parent_path, _ = resolve(parent, RECIPES, "recipe", start=path.parent)
    return _read(parent_path, (*seen, path)) | facts


def _with_rendered(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """For a rendered task, take version, prompt, classes and splits from the code that draws it."""
    source = facts.get("source", {})
    if source.get("format") != "rendered":
        return facts
    task = source.get("task")
    spec = (SCENES.get(task) or RENDERED.get(task)) if isinstance(task, str) else None
    if spec is None:
        raise RecipeError(
            f"{path.name} names the rendered task '{task}', which does not exist",
            nearest(str(task), [*RENDERED, *SCENES]),
        )
    kind = spec.kind if task in SCENES else "classification"
    if facts.get("kind") in KINDS and facts["kind"] != kind:
        raise RecipeError(
            f"{path.name} is of the kind {facts['kind']}, and the rendered task '{task}' is {kind}",
            f"write 'kind: {kind}' in {path}",
        )
    if "classes" in facts and kind == "classification":
        raise RecipeError(
            f"{path.name} lists classes for a rendered task, which has its own",
            f"remove 'classes' from {path}",
        )
    for stream in facts.get("splits", {}).values():
        if not isinstance(stream, str) or stream not in spec.sizes:
            raise RecipeError(
                f"{path.name} names the split '{stream}', which '{task}' does not have",
                nearest(str(stream), spec.sizes),
            )
    drawn = {
        "version": spec.version,
        "splits": {s: s for s in spec.sizes},
        "expected_sizes": dict(spec.sizes),
    }
    if kind == "classification":
        drawn |= {"prompt": spec.prompt, "classes": list(spec.classes)}
    elif kind == "captioning":
        drawn["prompt"] = spec.instruction
    return drawn | facts
