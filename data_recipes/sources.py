"""Readers: one function per format, from files to records whose images are not decoded yet."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import datasets
from PIL import Image

from .errors import RecipeError, nearest

if TYPE_CHECKING:
    from .recipe import Recipe

log = logging.getLogger(__name__)


@dataclass
class Records:
    """What a reader found, in the source's order.

    Attributes:
        ids: one per record, the same wherever the files lie.
        images: a dataset whose column `image` holds bytes or paths, undecoded.
        labels: the source's labels (name or index), None outside classification.
        label_names: names of integer labels, where the source has them.
        questions: one per record, or None.
        answers: the reference answers of each record; empty for classification.
    """

    ids: list[str]
    images: datasets.Dataset
    labels: list[Any]
    label_names: list[str] | None
    questions: list[str | None]
    answers: list[list[str]]


def read_records(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """Read one split of a recipe whose examples lie in files or on the Hub.

    Raises:
        RecipeError: the data root, a file, a column or a field is missing or malformed.
    """
    return READERS[recipe.source["format"]](recipe, split, data_root)


# ------------------------------------------------------------------------------- where files lie


def set_folder(recipe: Recipe, data_root: str | Path | None) -> Path:
    """The folder of a task's files: under the data root, else beside the user's YAML.

    Raises:
        RecipeError: no data root is given, or the folder does not exist.
    """
    path = _own_path(recipe)
    if not path.is_absolute():
        base = Path(data_root).expanduser() if data_root is not None else recipe.folder
        if base is None:
            raise RecipeError(
                f"recipe '{recipe.name}' reads files from '{path}' under a data root, and none is given",
                "give the folder that holds it with --data-root",
            )
        path = base / path
    if not path.is_dir():
        raise RecipeError(
            f"the data of '{recipe.name}' is not there: no folder '{path}'",
            "give the folder that holds it with --data-root",
        )
    return path


def _own_path(recipe: Recipe) -> Path:
    path = recipe.source["path"]
    if not isinstance(path, str) or not path:
        raise RecipeError(
            f"recipe '{recipe.name}' does not say where its data is (source.path is {path!r})",
            f"write a YAML with 'extends: {recipe.name}' and a 'source:' that names a Hub dataset id "
            "(format: hub) or a folder of parquet files (format: parquet), and use its path as the task",
        )
    return Path(path).expanduser()


def _inside(folder: Path, name: str, what: str) -> Path:
    """`folder / name`, refused if the name leads out of the folder (links on disk are the user's own)."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise RecipeError(
            f"{what} has the path '{name}', which leads out of its data folder",
            "use a path inside the folder",
        )
    return folder / parts


def _split_file(recipe: Recipe, split: str, data_root: str | Path | None) -> Path:
    folder = set_folder(recipe, data_root)
    name = recipe.splits[split]
    if not isinstance(name, str):
        raise RecipeError(
            f"recipe '{recipe.name}' has {name!r} as its {split} split", "write one file name as text"
        )
    path = _inside(folder, name, f"split '{split}' of recipe '{recipe.name}'")
    if not path.exists():
        raise RecipeError(
            f"the {split} split of '{recipe.name}' is not there: no '{path}'",
            "add the file, or correct 'splits' in the recipe",
        )
    return path


# ----------------------------------------------------------------------- tables: parquet and Hub


def _parquet(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    folder = set_folder(recipe, data_root)
    patterns = recipe.splits[split]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in patterns:
        _inside(folder, pattern, f"split '{split}' of recipe '{recipe.name}'")
        found = sorted(folder.glob(pattern))
        if not found:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' is not there: no '{folder / pattern}'",
                "add the file, or correct 'splits' in the recipe",
            )
        files += found
    try:
        with _quiet():
            # a pattern again for datasets, so a folder named 'a[1]' has to be escaped
            table = datasets.load_dataset(
                "parquet", data_files=[glob.escape(str(f.absolute())) for f in files], split="train"
            )
    except Exception as error:  # datasets wraps whatever pyarrow raises
        cause = error.__cause__ or error
        raise RecipeError(
            f"the {split} split of '{recipe.name}' cannot be read as parquet ({_told(cause)})",
            f"replace {', '.join(f.name for f in files[:3])}",
        ) from error
    return _from_table(recipe, split, table)


def _hub(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    path = _own_path(recipe)
    local = path
    if not path.is_absolute() and (base := data_root if data_root is not None else recipe.folder) is not None:
        local = Path(base).expanduser() / path
    target = str(local) if local.is_dir() else recipe.source["path"]
    try:
        with _quiet():
            table = datasets.load_dataset(
                target,
                recipe.source.get("config"),
                split=recipe.splits[split],
                revision=recipe.source.get("revision"),
            )
    except Exception as error:  # the Hub client and datasets raise a dozen kinds; the first is told
        raise RecipeError(
            f"Hub dataset '{target}' of recipe '{recipe.name}' cannot be loaded with the split "
            f"'{recipe.splits[split]}' ({_told(error)})",
            "check the id, the split's name and the network, or use parquet files with 'format: parquet'",
        ) from error
    return _from_table(recipe, split, table)


def _from_table(recipe: Recipe, split: str, table: datasets.Dataset) -> Records:
    """Records from a table's columns, by the names in `source.columns`."""
    names = recipe.source.get("columns", {})
    classify = recipe.kind == "classification"
    needed = ["image", "label"] if classify else ["image", "answers"] + ["question"] * (recipe.kind == "vqa")
    for role in sorted({*needed, *names}):
        column = names.get(role, role)
        if column not in table.column_names:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' has no column '{column}'",
                f"{nearest(column, table.column_names)}; set it with 'source.columns.{role}' in the recipe",
            )

    def values(role: str) -> list[Any] | None:
        name = names.get(role, role)
        return table[name][:] if name in table.column_names else None

    count = len(table)
    ids = values("id") or [f"{split}-{i}" for i in range(count)]
    image = names.get("image", "image")
    images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    if image != "image":
        images = images.rename_column(image, "image")
    feature = table.features[names.get("label", "label")] if classify else None
    answers = [] if classify else [a if isinstance(a, list) else [a] for a in values("answers")]
    return Records(
        ids=[str(i) for i in ids],
        images=images,
        labels=values("label") if classify else [None] * count,
        label_names=list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        questions=[None] * count if classify else values("question") or [None] * count,
        answers=[[]] * count if classify else answers,
    )


# ------------------------------------------------------------------------------------ image folder


def _imagefolder(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """`<split folder>/<class>/.../picture`; the class is the folder's name.

    The walk is ours: datasets' own "imagefolder" builder numbers classes alphabetically, drops
    split folders whose names it doesn't know, and passes over other files without a word.
    """
    folder = set_folder(recipe, data_root)
    top = _split_file(recipe, split, data_root)
    endings = Image.registered_extensions()
    found: dict[str, str] = {}
    others: list[str] = []
    for place, folders, files in os.walk(top, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in endings:
                others.append(path.relative_to(folder).as_posix())
                continue
            parts = path.relative_to(top).parts
            if len(parts) < 2:
                raise RecipeError(
                    f"'{path.relative_to(folder)}' of '{recipe.name}' lies in no class folder",
                    f"move it to {top.name}/<class>/{name}",
                )
            found[path.relative_to(folder).as_posix()] = parts[0]
    if others:
        log.warning(
            "%s/%s: %d files are no images and are left out (%s)",
            recipe.name,
            split,
            len(others),
            ", ".join(sorted(others)[:3]),
        )
    ids = sorted(found)
    return Records(
        ids=ids,
        images=_paths([folder / i for i in ids]),
        labels=[found[i] for i in ids],
        label_names=None,
        questions=[None] * len(ids),
        answers=[[]] * len(ids),
    )


def _paths(paths: list[Path]) -> datasets.Dataset:
    """A dataset of image files that are read when asked for."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    cells = [{"path": str(p.absolute()), "bytes": None} for p in paths]
    return datasets.Dataset.from_dict({"image": cells}, features=features)


# ---------------------------------------------------------------------------------------- JSON


def _llava_json(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """LLaVA's lists: `id`, `image`, `conversations` for training, or `question_id`, `image`, `text`, `answer`."""
    folder = set_folder(recipe, data_root)
    path = _split_file(recipe, split, data_root)
    rows = _read_json(path, list)
    ids, paths, questions, answers = [], [], [], []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RecipeError(f"record {i} of {path.name} is not a JSON object", "correct the file")
        name = row.get("id", row.get("question_id"))
        if name is None:
            raise RecipeError(f"record {i} of {path.name} has no 'id'", "give every record its own id")
        what = f"record '{name}' of {path.name}"
        image = row.get("image")
        if not isinstance(image, str):
            raise RecipeError(
                f"{what} has {'no' if image is None else 'more than one'} image",
                "give every record one image path",
            )
        question, answer = _turn(row, what)
        ids.append(str(name))
        paths.append(_inside(folder, image, what))
        questions.append(question)
        answers.append([str(a) for a in answer] if isinstance(answer, list) else [str(answer)])
    classify = recipe.kind == "classification"
    return Records(
        ids=ids,
        images=_paths(paths),
        labels=[a[0] for a in answers] if classify else [None] * len(ids),
        label_names=None,
        questions=[None] * len(ids) if classify else questions,
        answers=[[]] * len(ids) if classify else answers,
    )


def _turn(row: dict, what: str) -> tuple[str, Any]:
    """The question, without the image token, and the answer of one record."""
    if "conversations" not in row:
        if "text" not in row or "answer" not in row:
            raise RecipeError(
                f"{what} has neither 'conversations' nor 'text' and 'answer'", "add one of them"
            )
        return _without_token(row["text"]), row["answer"]
    turns = row["conversations"]
    speakers = (
        [t.get("from") if isinstance(t, dict) else None for t in turns] if isinstance(turns, list) else []
    )
    if speakers != ["human", "gpt"] or not all(isinstance(t.get("value"), str) for t in turns):
        raise RecipeError(
            f"{what} is not one question ('human') and one answer ('gpt')",
            "split longer conversations into one record per question",
        )
    return _without_token(turns[0]["value"]), turns[1]["value"]


def _without_token(text: str) -> str:
    return text.replace("<image>", "").strip()


def _coco_captions(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """COCO's captions: `images` and `annotations`, joined by image id; one record per image."""
    folder = set_folder(recipe, data_root)
    path = _split_file(recipe, split, data_root)
    content = _read_json(path, dict)
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
            paths.append(_inside(folder / recipe.source.get("images", "images"), image["file_name"], what))
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
        images=_paths(paths),
        labels=[None] * len(captions),
        label_names=None,
        questions=[None] * len(captions),
        answers=list(captions.values()),
    )


def _read_json(path: Path, kind: type) -> Any:
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


def _told(error: BaseException) -> str:
    """An error of another library, short enough for one sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own progress bars, which show for work of milliseconds too."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


READERS: dict[str, Callable[[Recipe, str, str | Path | None], Records]] = {
    "parquet": _parquet,
    "hub": _hub,
    "imagefolder": _imagefolder,
    "llava_json": _llava_json,
    "coco_captions": _coco_captions,
}
