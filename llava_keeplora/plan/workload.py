"""What a task asks of the machine: how many examples, and what the largest one looks like to the model.

Read from the data where they are there, else from what the recipe says of itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.config import RunConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Changed
from llava_keeplora.models import ClipFamily, Family, LlavaFamily, Prepared
from llava_keeplora.plan.machine import make_method
from llava_keeplora.start import Task, check_run, load_task
from llava_keeplora.start.reference_data import read_reference
from llava_keeplora_eval.metrics import check_metric
from llava_keeplora_eval.preparation import check_questions
from llava_keeplora_recipes import Recipe, TaskData, load_recipe, load_recipes
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.paths import set_folder
from llava_keeplora_recipes.readers import READERS

#: Tokens of a question with its frame, and of an answer, where there are no data to ask.
QUESTION, ANSWER = 96, 32
#: Tokens of a class prompt, where there is no tokenizer to ask.
PROMPT = 16
#: Bytes of a line of predictions beside the answer: JSON keys, an id, the recipe's name, version and
#: fingerprint.
LINE = 160

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """One task.

    Args:
        name: the task's name.
        train: examples to learn, a caption each where an image has several.
        test: examples to answer.
        images: examples of both splits together, as the image cache holds them.
        example: the longest training example as a batch of one; floating-point tensors are on the meta
            device.
        question: the longest test example as a batch of one, without its answer.
        prompts: CLIP's class prompts; nothing for other models.
        answer: characters of an answer on average.
    """

    name: str
    train: int
    test: int
    images: int
    example: Batch
    question: Batch
    prompts: Batch
    answer: float

    @property
    def tokens(self) -> int:
        """Of the longest training example, image tokens included; of the longest class prompt for CLIP."""
        ids = self.prompts["input_ids"] if self.prompts else self.example["input_ids"]
        return ids.shape[1]

    @property
    def predictions(self) -> int:
        """Bytes of the file of answers."""
        return round(self.test * (LINE + self.answer))

    @property
    def image_bytes(self) -> int:
        """Of one example's preprocessed images."""
        return self.example["pixel_values"].nbytes if "pixel_values" in self.example else 0


def repeated(batch: Batch, times: int) -> dict[str, Tensor]:
    """Repeat a batch of one example `times` times; its floating-point tensors become zeros on the device."""
    return {
        key: torch.zeros(times * len(value), *value.shape[1:])
        if value.is_floating_point()
        else torch.cat([value] * times)
        for key, value in batch.items()
    }


def read_work(config: RunConfig, family: Family, changed: Mapping[str, Changed], world: int) -> list[Work]:
    """Every task of a run, once whatever a start would refuse has been looked for.

    Args:
        config: the run.
        family: the model; its weights are not needed.
        changed: label → what its method changes of the model.
        world: processes.

    Raises:
        RecipeError, EvalError: for a recipe or data that are wrong.
        ConfigError: if data are absent and the recipe doesn't say how many there are; or see `check_run`.
    """
    recipes, root = load_recipes(config.tasks), config.data.root
    tasks = {recipe.name: load_task(recipe, config.data) for recipe in recipes if _is_there(recipe, root)}
    recipes = [tasks[recipe.name].recipe if recipe.name in tasks else recipe for recipe in recipes]
    for recipe in recipes:
        check_metric(recipe.metric)
    work = [_read(recipe, tasks.get(recipe.name), config, family) for recipe in recipes]
    for label, method in config.methods.items():
        wanted = make_method(method).reference_data_spec()
        if wanted and not _is_absent(wanted[0], root):
            read_reference(label, *wanted, config.data, family, lambda data: Prepared(family, data))
    check_run(config, family, changed, list(tasks.values()), recipes, [one.train for one in work], world)
    return work


def _read(recipe: Recipe, task: Task | None, config: RunConfig, family: Family) -> Work:
    describe = _clip if isinstance(family, ClipFamily) else _llava
    if task is not None:
        return describe(recipe, family, task.train, task.test)
    sizes = recipe.expected_sizes
    if not {"train", "test"} <= set(sizes):
        raise ConfigError(
            f"the data of '{recipe.name}' are not there and its recipe does not say how many there are",
            "give the folder that holds them with --data-root, or add `expected_sizes: {train: N, test: M}` "
            "to a recipe that extends it",
        )
    work = describe(recipe, family, None, None)
    train, test = sizes["train"], sizes["test"]
    if config.data.holdout:
        train, test = train - round(config.data.holdout * train), round(config.data.holdout * train)
    return dataclasses.replace(work, train=train, test=test, images=train + test)


def _is_there(recipe: Recipe, root: str | None) -> bool:
    if not READERS[recipe.source["format"]].has_files:
        return True
    try:
        set_folder(recipe, root)
    except RecipeError:
        return False
    return True


def _is_absent(name: str, root: str | None) -> bool:
    """Whether a recipe is there and its data are not."""
    try:
        return not _is_there(load_recipe(name), root)
    except RecipeError:
        return False


def _clip(recipe: Recipe, family: ClipFamily, train: TaskData | None, test: TaskData | None) -> Work:
    """Every image is alike, so the class prompts are all there is to measure."""
    vision, text = family.model.config.vision_config, family.model.config.text_config
    if train is not None or recipe.classes:
        if train is not None:
            family.check(test)
        prompts = family.tokens(recipe.prompts)
    else:
        if not recipe.num_classes:
            raise ConfigError(
                f"the classes of '{recipe.name}' are read from its data, which are not there",
                "give the folder that holds them with --data-root",
            )
        ids = torch.zeros(
            recipe.num_classes, min(PROMPT, int(text.max_position_embeddings)), dtype=torch.long
        )
        prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.empty(1, 3, vision.image_size, vision.image_size, device="meta")
    classes = recipe.classes or [" " * ANSWER]
    return Work(
        recipe.name,
        len(train or ()),
        len(test or ()),
        len(train or ()) + len(test or ()),
        {"pixel_values": pixels, "labels": torch.zeros(1, dtype=torch.long)},
        {"pixel_values": pixels},
        dict(prompts),
        sum(map(len, classes)) / len(classes),
    )


def _llava(recipe: Recipe, family: LlavaFamily, train: TaskData | None, test: TaskData | None) -> Work:
    if train is None:
        example, question = _assumed(family)
        return Work(recipe.name, 0, 0, 0, example, question, {}, 4.0 * ANSWER)
    inputs = family.inputs(train, Prepared(family, train))
    longest = max(range(len(inputs)), key=lambda i: len(inputs.turns[i]))
    asked = max(check_questions(family.preparation, test), key=len)
    question = {
        "input_ids": torch.tensor([asked.prompt]),
        "attention_mask": torch.ones(1, len(asked), dtype=torch.long),
    }
    question |= family.prepare([test[asked.row]])[0]
    said = [len(answers[0]) for answers in test.answers if answers]
    return Work(
        recipe.name,
        len(inputs),
        len(test),
        len(train) + len(test),
        _on_meta(inputs.collate([longest])),
        _on_meta(question),
        {},
        sum(said) / max(1, len(said)),
    )


def _on_meta(batch: Batch) -> dict[str, Tensor]:
    return {key: value.to("meta") if value.is_floating_point() else value for key, value in batch.items()}


def _assumed(family: LlavaFamily) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an example of one image, a question of `QUESTION` tokens and an answer of `ANSWER`."""
    config = family.config
    if config.model_type != "llava":
        raise ConfigError(
            f"how many tokens an image takes in a '{config.model_type}' model depends on its size, and the "
            "data are not there",
            "give the folder that holds them with --data-root",
        )
    vision = config.vision_config
    image = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    text = min(QUESTION + ANSWER, family.max_length - image)
    answer = min(ANSWER, text // 2)
    ids = torch.full((1, image + text), config.image_token_id)
    ids[:, image:] = (config.image_token_id + 1) % config.text_config.vocab_size
    labels = torch.full_like(ids, -100)
    labels[:, -answer:] = ids[:, -answer:]
    mask, pixels = (
        torch.ones_like(ids),
        torch.empty(1, 3, vision.image_size, vision.image_size, device="meta"),
    )
    example = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "image_rows": torch.ones(1, 1, dtype=torch.long),
        "pixel_values": pixels,
    }
    return example, {
        "input_ids": ids[:, :-answer],
        "attention_mask": mask[:, :-answer],
        "pixel_values": pixels,
    }
