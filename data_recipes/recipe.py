"""The recipe of a task: its questions and prompts, its metric, and the source of its examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .placeholders import place_images
from .registry import Registry

#: Registries for names of plug-in metrics and readers; the objects are in `llava_keeplora_eval` and
#: `readers`.
METRIC_NAMES = Registry("metric", "llava_keeplora.metrics", {})
READER_NAMES = Registry("reader", "llava_keeplora.readers", {})

# The question to a generative model if a classification recipe has no instruction; the second sentence is
# LLaVA-1.5's for short answers (Liu et al., 2024, arXiv:2310.03744).
ASKS = "What is shown in the image?\nAnswer the question using a single word or phrase."

#: Which answers of a conversation a test asks for.
EVALUATE = LAST, EACH = "last", "each"

# Fields that are not part of a task's identity: a corrected citation must not change it, nor the folder of
# its files, nor test prompts, which are used only if a run's configuration says so, and recorded by the run.
NOT_IDENTITY = (
    "licence",
    "homepage",
    "citation",
    "description",
    "seen_by",
    "folder",
    "expected_sizes",
    "test_prompts",
    "tables",
)


@dataclass(frozen=True)
class Recipe:
    """What a task is: its prompt, classes, metric, and where its examples come from.

    Attributes:
        name: the task's name, for example `digits` or `mtil/aircraft`; folders of a run are named after it.
        version: a whole number to raise whenever the examples, the classes or the prompt change.
        kind: `classification`, `vqa` (questions with answers) or `captioning`.
        metric: how answers are scored, for example `accuracy`, or `my_metrics.py:my_metric` next to it.
        licence: licence of the data, for the model card.
        source: `format`, and the keys of that format (`path`, `columns`, ...).
        splits: name of a split, such as `train` and `test` → the source's file, folder, pattern or split.
        prompt: for classification a caption with `{c}` for the class (required); for vqa a text around the
            question, `{q}`, which stands alone without it; for captioning the instruction, which a record's
            own replaces.
        test_prompt: for vqa, takes the place of `prompt` in the split `test`; a mapping from the first
            reference answer to a prompt (`other` for the rest) where an official runner does that.
        test_prompts: for classification, captions with `{c}` whose text features are averaged where a test
            asks for that, as CLIP's own tests do (Radford et al., 2021, section 3.1.4); `prompt` alone where
            there are none.
        instruction: for classification, what a generative model is asked; by default what is shown in the
            image, in a single word or phrase.
        evaluate: for questions and captions, which answers of a conversation the split `test` asks for: the
            `last` one (the default), or `each` as an example of its own with the true turns before it.
        classes: for classification (required), class names in label order, as answers are scored;
            `from-source` takes them from the data, when a split is loaded.
        num_classes: for classification, the number of classes that there must be.
        class_names: for classification, the source's label → the class, where the two differ.
        homepage: where the data comes from, for the model card.
        citation: what to cite.
        description: what the task is, in a sentence.
        seen_by: models whose pre-training saw the split `pretrain`.
        expected_sizes: name of a split → its number of examples in the published protocol; another number is
            warned of.
        background: `#rrggbb`, what is seen through transparent pixels; white by default.
        folder: folder of a user's YAML, where relative paths start without a data root.
        tables: name of a split → the `datasets.Dataset` with its rows, for the format `dataset` alone.
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
    evaluate: str = LAST
    folder: Path | None = field(default=None, compare=False)
    tables: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompts(self) -> list[str]:
        """Prompts of the classes in label order, with underscores as spaces; see `class_prompts`."""
        return self.class_prompts(self.prompt)

    def class_prompts(self, template: str) -> list[str]:
        """Return a caption of every class in label order, with underscores as spaces.

        Args:
            template: the caption, with `{c}` for the class; for instance one of `test_prompts`.

        Raises:
            RecipeError: the task has no classes, or they have not been read from its source yet.
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
        # `replace` rather than `format`, because a class or a prompt may have other braces.
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
        """Name of the metric without a path of this machine; of one in a file, `module:object`."""
        return METRIC_NAMES.portable_name(self.metric)

    @property
    def format_name(self) -> str:
        """Name of the source's format without a path of this machine; of one in a file, `module:Object`."""
        return READER_NAMES.portable_name(self.source["format"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of all fields that a model's inputs and its score depend on."""
        facts = {key.name: getattr(self, key.name) for key in fields(self) if key.name not in NOT_IDENTITY}
        for key in ("instruction", "test_prompt", "background"):
            if facts[key] is None:
                del facts[key]  # as before there were any, so that older files keep their recipe
        if self.evaluate == LAST:
            del facts["evaluate"]
        facts["metric"] = self.metric_name
        facts["source"] = {k: v for k, v in self.source.items() if k != "path"} | {"format": self.format_name}
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
