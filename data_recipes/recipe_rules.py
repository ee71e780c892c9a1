"""Rules for the keys and values of a recipe's YAML."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest
from .labels import check_distinct
from .placeholders import MARKER, place_images, refuse_foreign
from .prompts import OTHER
from .readers import KINDS, check_source
from .recipe import EVALUATE, LAST
from .texts import is_blank

FROM_SOURCE = "from-source"

# Keys of a YAML file: the type of each value, and the word for that type in errors.
KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "extends": (str, "text"),
    "name": (str, "text"),
    "version": (int, "a whole number"),
    "kind": (str, "text"),
    "prompt": (str, "text"),
    "test_prompt": ((str, dict), "text or a mapping"),
    "test_prompts": (list, "a list"),
    "instruction": (str, "text"),
    "metric": (str, "text"),
    "licence": (str, "text"),
    "homepage": (str, "text"),
    "citation": (str, "text"),
    "description": (str, "text"),
    "seen_by": (list, "a list"),
    "classes": (object, "a list, or from-source"),
    "num_classes": (int, "a whole number"),
    "class_names": (dict, "a mapping"),
    "source": (dict, "a mapping"),
    "splits": (dict, "a mapping"),
    "expected_sizes": (dict, "a mapping"),
    "evaluate": (str, "last or each"),
    "background": (str, "a colour such as '#ffffff', in quotes"),
}
REQUIRED = ("name", "version", "kind", "metric", "licence", "source", "splits")
#: Most characters of a name: file systems allow 255 bytes, and files of a task add to its name.
MAX_NAME = 100
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def check_recipe(facts: dict[str, Any], path: Path) -> None:
    """Check the keys and values of a recipe, so that errors do not appear later, or never.

    Args:
        facts: the YAML's content, with the recipes that it extends.
        path: the file, for errors.

    Raises:
        RecipeError: naming the file, the key, the rule and the cure.
    """
    where = path.name
    if not NAME.fullmatch(facts["name"]):
        raise RecipeError(
            f"{where} has the name '{facts['name']}', which cannot be a folder",
            "use letters, digits, '.', '_', '-', and '/' between parts",
        )
    if len(facts["name"]) > MAX_NAME:
        raise RecipeError(
            f"{where} has a name of {len(facts['name'])} characters, and folders are named after it",
            f"use {MAX_NAME} at most",
        )
    if facts["kind"] not in KINDS:
        raise RecipeError(f"{where} has the kind '{facts['kind']}'", nearest(facts["kind"], KINDS))
    check_source(facts["source"], facts["kind"], path)
    _check_background(facts, path)
    _check_splits(facts["splits"], facts["source"], path)
    for name in facts.get("seen_by", []):
        if not isinstance(name, str):
            raise RecipeError(f"{where} has {name!r} under 'seen_by'", "write model names as text")
    if facts["kind"] != "vqa" and "test_prompt" in facts:
        raise RecipeError(
            f"{where} has 'test_prompt', which a {facts['kind']} recipe does not use",
            f"remove it from {path}",
        )
    if facts.get("evaluate", LAST) not in EVALUATE:
        raise RecipeError(
            f"{where} has 'evaluate: {facts['evaluate']}'",
            f"{nearest(facts['evaluate'], EVALUATE)}: the last answer of a conversation, or each",
        )
    if facts["kind"] == "classification":
        if "evaluate" in facts:
            raise RecipeError(
                f"{where} has 'evaluate', which a classification recipe does not use",
                f"remove it from {path}",
            )
        _check_classes(facts, path)
        return
    for key in ("test_prompts", "instruction", "classes", "num_classes", "class_names"):
        if key in facts:
            raise RecipeError(
                f"{where} has '{key}', which a {facts['kind']} recipe does not use", f"remove it from {path}"
            )
    refuse_foreign(facts.get("prompt", ""), f"the prompt of {where}")
    if facts["kind"] == "vqa":
        _check_prompts(facts, path)


def _check_splits(splits: dict[str, Any], source: dict[str, Any], path: Path) -> None:
    where = path.name
    if not splits:
        raise RecipeError(
            f"{where} has no splits", f"add at least 'train:' and 'test:' under 'splits' in {path}"
        )
    for split, place in splits.items():
        listed = place if isinstance(place, list) else [place]
        if not listed or not all(isinstance(p, str) for p in [split, *listed]):
            raise RecipeError(
                f"{where} has {place!r} as its split {split!r}",
                "write the file, folder or split name as text",
            )
    for key in ("images", "references", "positional_ids"):
        named = source.get(key, [])
        for split in named if isinstance(named, dict | list) else []:
            if split not in splits:
                raise RecipeError(
                    f"{where} names the split '{split}' under 'source.{key}', which it does not have",
                    nearest(str(split), splits),
                )


def _check_background(facts: dict[str, Any], path: Path) -> None:
    colour = facts.get("background", "#ffffff")
    if not COLOUR.fullmatch(colour):
        raise RecipeError(
            f"{path.name} has the background '{colour}'", "write a colour as '#rrggbb', '#ffffff' for white"
        )
    if "background" in facts and facts["source"]["format"] == "rendered":
        raise RecipeError(
            f"{path.name} has 'background', which a rendered task does not use", f"remove it from {path}"
        )


def _check_prompts(facts: dict[str, Any], path: Path) -> None:
    test = facts.get("test_prompt", {OTHER: "{q}"})
    by_answer = test if isinstance(test, dict) else {OTHER: test}
    if OTHER not in by_answer:
        raise RecipeError(
            f"{path.name} has a 'test_prompt' by answer without '{OTHER}'",
            f"add '{OTHER}:' with the prompt for every other answer",
        )
    for answer in by_answer:
        if not isinstance(answer, str):
            raise RecipeError(
                f"{path.name} has the answer {answer!r} under 'test_prompt', which YAML does not read as "
                "text",
                "put quotes around it",
            )
    for key, prompt in (
        ("prompt", facts.get("prompt", "{q}")),
        *(("test_prompt", p) for p in by_answer.values()),
    ):
        if not isinstance(prompt, str) or "{q}" not in prompt:
            raise RecipeError(
                f"{path.name} has the {key} '{prompt}', which has no place for the question",
                f"write {{q}} where the question goes, or leave '{key}' out",
            )
        refuse_foreign(prompt, f"the {key} of {path.name}")


def _check_classes(facts: dict[str, Any], path: Path) -> None:
    where = path.name
    if is_blank(facts.get("instruction", "?")):
        raise RecipeError(
            f"{where} has an empty 'instruction'", "write the question, or leave 'instruction' out"
        )
    refuse_foreign(facts.get("instruction", ""), f"the instruction of {where}")
    place_images(facts.get("instruction", ""), 1, f"the instruction of {where}")
    for key in ("prompt", "classes"):
        if key not in facts:
            raise RecipeError(f"{where} lacks the key '{key}'", f"add '{key}:' to {path}")
    templates = facts.get("test_prompts", [])
    for prompt in [facts["prompt"], *templates]:
        if not isinstance(prompt, str) or "{c}" not in prompt:
            raise RecipeError(
                f"{where} has the prompt {prompt!r}, which has no place for the class",
                "write {c} where the class name goes, as in 'a photo of a {c}.'",
            )
        refuse_foreign(prompt, f"the prompt of {where}")
        if MARKER in prompt:
            raise RecipeError(
                f"{where} marks an image in its prompt, which is a caption for a class",
                f"remove {MARKER} there",
            )
    repeated = [prompt for prompt in templates if templates.count(prompt) > 1]
    if repeated:
        raise RecipeError(
            f"{where} lists the test prompt '{repeated[0]}' twice, which would count double",
            "remove one of them",
        )
    classes = facts["classes"]
    if classes == FROM_SOURCE:
        return
    if not isinstance(classes, list) or len(classes) < 2:
        raise RecipeError(
            f"{where} has no list of at least two classes",
            f"list them under 'classes', or write 'classes: {FROM_SOURCE}'",
        )
    for c in classes:
        # YAML reads 3 as a number and no as False
        if not isinstance(c, str):
            raise RecipeError(
                f"{where} has the class {c!r}, which YAML does not read as text", "put quotes around it"
            )
    twice = sorted(c for c, count in Counter(classes).items() if count > 1)
    if twice:
        raise RecipeError(f"{where} lists the class '{twice[0]}' twice", "remove one of them")
    check_distinct(classes, where)
    count = facts.get("num_classes")
    if count is not None and count != len(classes):
        raise RecipeError(
            f"{where} lists {len(classes)} classes but says num_classes: {count}", "correct one of them"
        )
    for label, c in facts.get("class_names", {}).items():
        if c not in classes:
            raise RecipeError(
                f"{where} maps the label '{label}' to '{c}', which is not one of its classes",
                nearest(str(c), classes),
            )
