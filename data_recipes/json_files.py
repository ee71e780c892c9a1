"""JSON files beside a folder of images: LLaVA's questions and COCO's captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError
from .places import inside, set_folder, split_file
from .records import Records, image_files, one_each, shared_files

if TYPE_CHECKING:
    from .recipe import Recipe


def read_llava(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """LLaVA's lists: `id`, `image`, `conversations`, or `question_id`, `image`, `text`, `answer`.

    Image paths are relative to the task's folder. Source of the two layouts: LLaVA's documentation,
    github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md and docs/Evaluation.md.

    Raises:
        RecipeError: the file is missing or no JSON, or a record lacks something; it is named.
    """
    folder = set_folder(recipe, data_root)
    path = split_file(recipe, split, data_root)
    rows = _parse(path, list)
    ids, paths, questions, answers = [], [], [], []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RecipeError(f"record {i} of {path.name} is not a JSON object", "correct the file")
        name = row.get("id", row.get("question_id"))
        if name is None:
            raise RecipeError(f"record {i} of {path.name} has no 'id'", "give every record its own id")
        what = f"record '{name}' of {path.name}"
        image = row.get("image")
        listed = [] if image is None else image if isinstance(image, list) else [image]
        if not all(isinstance(i, str) for i in listed):
            raise RecipeError(
                f"{what} has {image!r} as its image", "write one path, a list of paths, or leave 'image' out"
            )
        question, answer = _turn(row, what)
        if not isinstance(question, str) or answer in (None, []):
            raise RecipeError(f"{what} has no question or no answer", "complete or remove the record")
        ids.append(str(name))
        paths.append([inside(folder, i, what) for i in listed])
        questions.append(question.replace("<image>", "").strip())
        answers.append([str(a) for a in answer] if isinstance(answer, list) else [str(answer)])
    classify = recipe.kind == "classification"
    images, pictures = shared_files(paths)
    return Records(
        ids=ids,
        images=images,
        pictures=pictures,
        labels=[a[0] for a in answers] if classify else [None] * len(ids),
        label_names=None,
        questions=[None] * len(ids) if classify else questions,
        answers=[[]] * len(ids) if classify else answers,
    )


def _turn(row: dict, what: str) -> tuple[Any, Any]:
    """The question and the answer of one record."""
    if "conversations" not in row:
        if "text" not in row or "answer" not in row:
            raise RecipeError(
                f"{what} has neither 'conversations' nor 'text' and 'answer'", "add one of them"
            )
        return row["text"], row["answer"]
    turns = row["conversations"]
    speakers = (
        [t.get("from") if isinstance(t, dict) else None for t in turns] if isinstance(turns, list) else []
    )
    if speakers != ["human", "gpt"] or not all(isinstance(t.get("value"), str) for t in turns):
        raise RecipeError(
            f"{what} is not one question ('human') and one answer ('gpt')",
            "split longer conversations into one record per question",
        )
    return turns[0]["value"], turns[1]["value"]


def read_coco(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """COCO's captions: `images` and `annotations`, joined by image id; one record per image.

    Image paths are relative to `source.images` (by default `images`) in the task's folder. Source
    of the layout: cocodataset.org, "Data format", "Image Captioning".

    Raises:
        RecipeError: the file is missing or no JSON, or an entry lacks something.
    """
    folder = set_folder(recipe, data_root)
    path = split_file(recipe, split, data_root)
    content = _parse(path, dict)
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise RecipeError(f"{path.name} has no list '{key}'", "use the layout of COCO's caption files")
    captions: dict[Any, list[str]] = {}
    paths: list[Path] = []
    try:
        for image in content["images"]:
            what = f"image {image['id']} of {path.name}"
            if image["id"] in captions:
                raise RecipeError(f"{what} is listed twice", "keep one entry per image")
            captions[image["id"]] = []
            paths.append(inside(folder / recipe.source.get("images", "images"), image["file_name"], what))
        for note in content["annotations"]:
            if note["image_id"] not in captions:
                raise RecipeError(
                    f"annotation {note.get('id')} of {path.name} is for the image {note['image_id']}, which is not listed",
                    "add the image or remove the annotation",
                )
            captions[note["image_id"]].append(note["caption"])
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f"{path.name} has an entry without the field {error}", "use the layout of COCO's caption files"
        ) from error
    bare = [i for i, texts in captions.items() if not texts]
    if bare:
        raise RecipeError(
            f"{len(bare)} images of {path.name} have no caption (first: {bare[0]})",
            "add captions or remove the images",
        )
    return Records(
        ids=[str(i) for i in captions],
        images=image_files(paths),
        pictures=one_each(len(captions)),
        labels=[None] * len(captions),
        label_names=None,
        questions=[None] * len(captions),
        answers=list(captions.values()),
    )


def _parse(path: Path, kind: type) -> Any:
    # the standard library's reader, not datasets': it keeps ids that are numbers in one record and
    # text in the next, and lets an error name the record
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not readable JSON ({error})", "correct the file") from error
    if not isinstance(content, kind):
        raise RecipeError(
            f"{path.name} holds a {type(content).__name__}, not a {kind.__name__}", "correct the file"
        )
    return content
