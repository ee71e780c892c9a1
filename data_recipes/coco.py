"""Reader of COCO's caption files: images and annotations, joined by image id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import RecipeError, collect_errors, report_error
from .json_files import read_json
from .media import refuse_unread_media
from .paths import data_root_of, inside, pictures_folder, split_file
from .recipe import Recipe
from .records import Records, picture_files
from .texts import as_text, described, identifier, is_blank


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
    folder, root = pictures_folder(recipe, split, data_root), data_root_of(recipe, data_root)
    content = read_json(path, dict)
    captions = captions_by_image(content, path, problems)

    def record(image: dict[str, Any]) -> tuple[Any, list[Path]]:
        name = image.get("file_name")
        if not isinstance(name, str) or is_blank(name):
            raise RecipeError(
                f"image {image['id']} of {path.name} has {described(name)} as 'file_name', which is no path",
                "write the name of its file",
            )
        refuse_unread_media(image, f"image {image['id']} of {path.name}")
        return image["id"], [inside(folder, image["file_name"], f"image {image['id']} of {path.name}", root)]

    listed = {i["id"]: i for i in content["images"] if _has_id(i) and i["id"] in captions}
    records = collect_errors(record, listed.values(), problems)
    return Records(
        ids=[identifier(i, path.name) for i, _ in records],
        pictures=picture_files([paths for _, paths in records]),
        labels=[None] * len(records),
        label_names=None,
        questions=[None] * len(records),
        answers=[captions[i] for i, _ in records],
    )


def captions_by_image(
    content: dict[str, Any], path: Path, problems: list[RecipeError] | None = None
) -> dict[Any, list[str]]:
    """Return the captions of every image id, in the order of the file's `images`.

    Args:
        content: the parsed file.
        path: the file, for errors.
        problems: list that collects errors; they are raised when None.

    Raises:
        RecipeError: a list is missing, or an entry lacks a field, is listed twice or has no partner.
    """
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise RecipeError(f"{path.name} has no list '{key}'", "use the layout of COCO's caption files")
    captions: dict[Any, list[str]] = {}

    def image(entry: Any) -> None:
        if not _has_id(entry):
            raise _without("id", path)
        if entry["id"] in captions:
            raise RecipeError(
                f"image {entry['id']} of {path.name} is listed twice", "keep one entry per image"
            )
        captions[entry["id"]] = []

    def note(entry: Any) -> None:
        for key in ("image_id", "caption"):
            if not isinstance(entry, dict) or entry.get(key) is None:
                raise _without(key, path)
        if not _is_id(entry["image_id"]):
            raise _without("image_id", path)
        if entry["image_id"] not in captions:
            raise RecipeError(
                f"annotation {entry.get('id')} of {path.name} is for the image {entry['image_id']}, which is "
                "not listed",
                "add the image or remove the annotation",
            )
        what = f"an annotation of the image {entry['image_id']} of {path.name}"
        captions[entry["image_id"]].append(as_text(entry["caption"], what, "caption"))

    collect_errors(image, content["images"], problems)
    collect_errors(note, content["annotations"], problems)
    without_caption = [i for i, texts in captions.items() if not texts]
    if without_caption:
        report_error(
            RecipeError(
                f"{len(without_caption)} images of {path.name} have no caption (first: {without_caption[0]})",
                "add captions or remove the images",
            ),
            problems,
        )
    return {i: texts for i, texts in captions.items() if texts}


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_id(entry.get("id"))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _without(field: str, path: Path) -> RecipeError:
    return RecipeError(
        f"{path.name} has an entry without the field '{field}'", "use the layout of COCO's caption files"
    )
