"""What a recipe's YAML may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest

KINDS = ("classification", "vqa", "captioning")
FROM_SOURCE = "from-source"

# What a YAML may say: the type of each key, and the sentence's word for that type.
KEYS: dict[str, tuple[type, str]] = {
    "extends": (str, "text"),
    "name": (str, "text"),
    "version": (int, "a whole number"),
    "kind": (str, "text"),
    "prompt": (str, "text"),
    "instruction": (str, "text"),
    "metric": (str, "text"),
    "licence": (str, "text"),
    "homepage": (str, "text"),
    "citation": (str, "text"),
    "description": (str, "text"),
    "seen_by": (list, "a list"),
    "classes": (object, "a list"),
    "num_classes": (int, "a whole number"),
    "class_names": (dict, "a mapping"),
    "source": (dict, "a mapping"),
    "splits": (dict, "a mapping"),
    "expected_sizes": (dict, "a mapping"),
}
SOURCE_KEYS = {
    "rendered": ("format", "task"),
    "hub": ("format", "path", "config", "revision", "columns"),
    "parquet": ("format", "path", "columns"),
    "imagefolder": ("format", "path"),
    "llava_json": ("format", "path"),
    "coco_captions": ("format", "path", "images"),
}
# Formats not listed here can hold every kind.
FORMAT_KINDS = {
    "imagefolder": ("classification",),
    "coco_captions": ("captioning",),
}
COLUMNS = ("id", "image", "label", "question", "answers")
REQUIRED = ("name", "version", "kind", "metric", "licence", "source", "splits")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def check_recipe(facts: dict[str, Any], path: Path) -> None:
    """Refuse what would only fail, or silently mislead, later.

    Raises:
        RecipeError: names the file, what is wrong in it, and the cure.
    """
    where = path.name
    if not NAME.fullmatch(facts["name"]):
        raise RecipeError(
            f"{where} has the name '{facts['name']}', which cannot be a folder",
            "use letters, digits, '.', '_', '-', and '/' between parts",
        )
    if facts["kind"] not in KINDS:
        raise RecipeError(f"{where} has the kind '{facts['kind']}'", nearest(facts["kind"], KINDS))
    _check_source(facts["source"], facts["kind"], path)
    if not facts["splits"]:
        raise RecipeError(
            f"{where} has no splits", f"add at least 'train:' and 'test:' under 'splits' in {path}"
        )
    for split, place in facts["splits"].items():
        listed = place if isinstance(place, list) else [place]
        if not listed or not all(isinstance(p, str) for p in [split, *listed]):
            raise RecipeError(
                f"{where} has {place!r} as its split {split!r}",
                "write the file, folder or split name as text",
            )
    for name in facts.get("seen_by", []):
        if not isinstance(name, str):
            raise RecipeError(f"{where} has {name!r} under 'seen_by'", "write model names as text")
    if facts["kind"] == "classification":
        _check_classes(facts, path)
        return
    for key in ("instruction", "classes", "num_classes", "class_names"):
        if key in facts:
            raise RecipeError(
                f"{where} has '{key}', which a {facts['kind']} recipe does not use", f"remove it from {path}"
            )
    if facts["kind"] == "vqa" and "{q}" not in facts.get("prompt", "{q}"):
        raise RecipeError(
            f"{where} has the prompt '{facts['prompt']}', which has no place for the question",
            "write {q} where the question goes, or leave 'prompt' out",
        )


def _check_source(source: dict[str, Any], kind: str, path: Path) -> None:
    where = path.name
    form = source.get("format")
    if form not in SOURCE_KEYS:
        raise RecipeError(f"{where} has the source format '{form}'", nearest(str(form), SOURCE_KEYS))
    for key in source:
        if key not in SOURCE_KEYS[form]:
            raise RecipeError(
                f"{where} has the unknown key 'source.{key}' for format {form}",
                nearest(key, SOURCE_KEYS[form]),
            )
    if form != "rendered" and "path" not in source:
        raise RecipeError(f"{where} lacks the key 'source.path'", f"add 'path:' under 'source' in {path}")
    if kind not in FORMAT_KINDS.get(form, KINDS):
        raise RecipeError(
            f"{where} is of the kind {kind}, which the format {form} does not hold",
            f"use {FORMAT_KINDS[form][0]}, or another format",
        )
    for key in source.get("columns", {}):
        if key not in COLUMNS:
            raise RecipeError(f"{where} has the unknown key 'source.columns.{key}'", nearest(key, COLUMNS))


def _check_classes(facts: dict[str, Any], path: Path) -> None:
    where = path.name
    if not facts.get("instruction", "?").strip():
        raise RecipeError(
            f"{where} has an empty 'instruction'", "write the question, or leave 'instruction' out"
        )
    for key in ("prompt", "classes"):
        if key not in facts:
            raise RecipeError(f"{where} lacks the key '{key}'", f"add '{key}:' to {path}")
    if "{c}" not in facts["prompt"]:
        raise RecipeError(
            f"{where} has the prompt '{facts['prompt']}', which has no place for the class",
            "write {c} where the class name goes, as in 'a photo of a {c}.'",
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
    twice = sorted({c for c in classes if classes.count(c) > 1})
    if twice:
        raise RecipeError(f"{where} lists the class '{twice[0]}' twice", "remove one of them")
    wanted = facts.get("num_classes")
    if wanted is not None and wanted != len(classes):
        raise RecipeError(
            f"{where} lists {len(classes)} classes but says num_classes: {wanted}", "correct one of them"
        )
    for label, c in facts.get("class_names", {}).items():
        if c not in classes:
            raise RecipeError(
                f"{where} maps the label '{label}' to '{c}', which is not one of its classes",
                nearest(str(c), classes),
            )
