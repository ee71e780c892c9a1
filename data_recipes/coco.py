"""Reader of COCO's caption files: images and annotations, joined by image id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import RecipeError, collect_errors, report_error
from .json_files import read_json
from .media import refuse_unread_media
from .paths import data_root_of, images_folder, inside, split_file
from .recipe import Recipe
from .records import Records, image_files
from .texts import as_text, described, identifier, is_blank

CURE = "use the layout of COCO's caption files"


def read_coco(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read COCO's captions: `images` and `annotations`, joined by image id; one record per image.

    Image paths are relative to `source.images` (by default `images`) in the task's folder. Source
    of the layout: cocodataset.org, "Data format", "Image Captioning".

    Raises:
        RecipeError: the file is missing or not JSON, or entries lack a field; they are named.
    """
    path = split_file(recipe, split, data_root)
    folder, root = images_folder(recipe, split, data_root), data_root_of(recipe, data_root)
    content = read_json(path, dict)
    captions = captions_by_image(content, path, problems)

    def record(item: tuple[str, dict[str, Any]]) -> tuple[str, list[Path]]:
        name, image = item
        what, file = f"image {name} of {path.name}", image.get("file_name")
        if not isinstance(file, str) or is_blank(file):
            raise RecipeError(
                f"{what} has {described(file)} as 'file_name', which is no path", "write the name of its file"
            )
        refuse_unread_media(image, what)
        return name, [inside(folder, file, what, root)]

    listed: dict[str, dict[str, Any]] = {}
    for image in content["images"]:
        if (name := _id_of(image)) in captions:
            listed.setdefault(name, image)
    images = collect_errors(record, listed.items(), problems)
    return Records(
        ids=[name for name, _ in images],
        images=image_files([paths for _, paths in images]),
        labels=[None] * len(images),
        label_names=None,
        questions=[None] * len(images),
        answers=[captions[name] for name, _ in images],
    )


def captions_by_image(
    content: dict[str, Any], path: Path, problems: list[RecipeError] | None = None
) -> dict[str, list[str]]:
    """Return the captions of every image id as text, in the order of the file's `images`.

    Args:
        content: the parsed file.
        path: the file, for errors.
        problems: list that collects errors; they are raised when None.

    Raises:
        RecipeError: a list is missing, an entry lacks a field or has a value of another type there, is listed
            twice or has no partner.
    """
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise RecipeError(f"{path.name} has no list '{key}'", CURE)
    captions: dict[str, list[str]] = {name: [] for name in _image_ids(content["images"], path, problems)}
    # images of refused annotations, of which it is open how many captions they have
    refused: set[str] = set()
    # Files of other tools number all their annotations alike, so an id alone makes no second one.
    seen: set[tuple[str, str, str]] = set()

    def note(item: tuple[int, Any]) -> None:
        what, entry = _entry("annotations", item[0], path), item[1]
        name = identifier(_field(entry, "image_id", what), f"'image_id' of {what}")
        if name not in captions:
            raise RecipeError(
                f"{what} is for the image {name}, which is not listed",
                "add the image or remove the annotation",
            )
        refused.add(name)
        text = as_text(_field(entry, "caption", what), what, "caption")
        if (key := (_id_of(entry), name, text)) in seen and key[0]:
            raise RecipeError(
                f"{what} is a second annotation {key[0]} of the image {name}", "keep one of the two"
            )
        seen.add(key)
        captions[name].append(text)
        refused.discard(name)

    collect_errors(note, enumerate(content["annotations"]), problems)
    without_caption = [name for name, texts in captions.items() if not texts and name not in refused]
    if without_caption:
        report_error(
            RecipeError(
                f"{len(without_caption)} images of {path.name} have no caption (first: {without_caption[0]})",
                "add captions or remove the images",
            ),
            problems,
        )
    return {name: texts for name, texts in captions.items() if texts}


def _image_ids(images: list[Any], path: Path, problems: list[RecipeError] | None) -> list[str]:
    seen: set[str] = set()

    def image(item: tuple[int, Any]) -> str:
        what = _entry("images", item[0], path)
        name = identifier(_field(item[1], "id", what), what)
        if name in seen:
            raise RecipeError(f"image {name} of {path.name} is listed twice", "keep one entry per image")
        seen.add(name)
        return name

    return collect_errors(image, enumerate(images), problems)


def _entry(key: str, index: int, path: Path) -> str:
    return f"entry {index} of '{key}' in {path.name}"


def _id_of(entry: Any) -> str:
    """Return the id of an entry as text; empty where it has none, which is reported where it needs one."""
    try:
        return identifier(entry.get("id"), "") if isinstance(entry, dict) else ""
    except RecipeError:
        return ""


def _field(entry: Any, field: str, what: str) -> Any:
    if not isinstance(entry, dict):
        raise RecipeError(f"{what} is {described(entry)}, and an entry is an object", CURE)
    if entry.get(field) is None:
        raise RecipeError(f"{what} has no '{field}'", CURE)
    return entry[field]
