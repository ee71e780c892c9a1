"""The built-in formats of a recipe's source, each a dataclass whose fields are the keys under `source`.

The tables in docs/data.md are generated from these fields and their docstrings.
"""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from .errors import RecipeError, nearest
from .readers import Reader
from .recipe import Recipe
from .records import Records
from .registry import SEPARATOR

#: Role of a table's column → the column's content, for docs/data.md.
COLUMNS = {
    "id": "the record's id; without such a column records are numbered, `train-0`, `train-1`, ...",
    "image": "the image, a list of images, or paths of image files; `images` where there is no `image`",
    "label": "the class, by its name or its position counted from 0",
    "question": "what is asked; captioning can do without, by the recipe's `prompt`",
    "answers": "the accepted answer, or a list of them; captions",
    "hint": "a text before the question; for `options`",
    "messages": "a chat, in the place of `question`, `answers` and `label`; read only where it is named here",
}


@dataclass
class _BuiltIn(Reader):
    """A format of this package, read by `function` (`module:name`), which is imported on first use."""

    function: ClassVar[str]

    def read(
        self,
        recipe: Recipe,
        split: str,
        data_root: str | Path | None,
        problems: list[RecipeError] | None = None,
    ) -> Records:
        """See `Reader.read`; the function receives every key in `recipe.source`, with defaults if not set."""
        recipe = replace(recipe, source=recipe.source | asdict(self))
        module, _, name = self.function.partition(SEPARATOR)
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(
            recipe, split, data_root, problems
        )


def _mapping(word: str) -> Any:
    return field(default_factory=dict, metadata={"word": word})


def _list(word: str) -> Any:
    return field(default_factory=list, metadata={"word": word})


def _folders(default: str) -> Any:
    return field(default=default, metadata={"word": "a folder, or a mapping from splits to folders"})


@dataclass
class ImageFolder(_BuiltIn):
    """A folder of images per class; see `image_folder.read_image_folder`."""

    function = "image_folder:read_image_folder"
    kinds = ("classification",)


@dataclass
class _Table(_BuiltIn):
    """A table.

    Args:
        options: the columns with the options of a multiple-choice question, in the order of A, B, C, ...;
            they are asked as `A. text`, a line each, after the question. Empty ones are left out.
        meta: columns that are handed to the metric; hyphens in their names become underscores.
        where: column → the text that it must hold; other rows are no part of the task.
    """

    columns: dict[str, str] = _mapping("a mapping from roles to columns")
    options: list[str] = _list("a list of columns")
    meta: list[str] = _list("a list of columns")
    where: dict[str, str] = _mapping("a mapping from columns to texts")

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        for key in self.columns:
            if key not in COLUMNS:
                raise RecipeError(
                    f"{path.name} has the unknown key 'source.columns.{key}'", nearest(key, COLUMNS)
                )


@dataclass
class Parquet(_Table):
    """Parquet files with images in a column; see `tables.read_parquet`.

    Args:
        columns: role → column, if the column has another name than the role; see the roles below.
    """

    function = "tables:read_parquet"


@dataclass
class Hub(_Table):
    """A dataset on the Hub, or a folder in the Hub's layout; see `tables.read_hub`.

    Args:
        path: id of the dataset on the Hub, `owner/name`, or a folder of this machine, under the data root or
            next to the recipe.
        columns: role → column, if the column has another name than the role; see the roles above.
        config: the dataset's configuration (also called subset), if it has several.
        revision: commit, tag or branch of the dataset on the Hub; by default the newest.
    """

    function = "tables:read_hub"
    has_files = False

    config: str | None = None
    revision: str | None = None


@dataclass
class TableFile(_Table):
    """TSV, or JSON with a list of records, as a table; see `table_files.read_table_file`.

    Args:
        columns: role → column or field, if it has another name than the role; see the roles above.
        images: folder in which the paths of images start, within `path`; by default `path` itself.
    """

    function = "table_files:read_table_file"
    kinds = ("vqa", "captioning")

    images: str | dict[str, str] = _folders("")


@dataclass
class Mme(_BuiltIn):
    """MME's folders; see `mme.read_mme`."""

    function = "mme:read_mme"
    kinds = ("vqa",)


@dataclass
class DatasetObject(_Table):
    """A `datasets.Dataset` that a Python program holds; see `dataset_objects.read_dataset`.

    Args:
        columns: role → column, if the column has another name than the role; see the roles above.
    """

    function = "dataset_objects:read_dataset"
    path: ClassVar[None] = None
    has_files = False


@dataclass
class Messages(_BuiltIn):
    """Chats in JSON or JSONL; see `conversations.read_messages`.

    Args:
        images: folder in which the paths of images start, within `path`; by default `path` itself.
        positional_ids: the splits whose records are numbered, `train-0`, `train-1`, ..., whatever ids they
            have.
        meta: fields of a record that are handed to the metric, such as the kind of question.
        frames: how many frames are shown of each video.
        fps: how many of a video's listed frames are one second of it; their times are not known without.
            Video files have times of their own.
    """

    function = "conversations:read_messages"

    images: str | dict[str, str] = _folders("")
    positional_ids: list[str] = _list("a list of splits")
    meta: list[str] = _list("a list of fields")
    frames: int = 8
    fps: float | None = None

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        if self.frames < 1:
            raise RecipeError(
                f"{path.name} has {self.frames} under 'source.frames', and a video has at least one frame",
                f"correct it in {path}",
            )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise RecipeError(
                f"{path.name} has {self.fps} under 'source.fps', and frames of a second are more than 0",
                f"correct it in {path}, or leave it out",
            )


@dataclass
class LlavaJson(Messages):
    """LLaVA's conversations and questions in JSON or JSONL; see `conversations.read_llava`.

    Args:
        references: the file within `path` that has a split's answers, where they stand apart from the
            questions: captions in COCO's layout, TextVQA's annotations,
            or Video-ChatGPT's answers.
        answer: the field that holds the answer of a record without `conversations`.
    """

    function = "conversations:read_llava"

    references: dict[str, str] = _mapping("a mapping from splits to files")
    answer: str = "answer"

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        super().check(kind, path)
        if self.references and kind == "classification":
            raise RecipeError(
                f"{path.name} has 'source.references', which a classification recipe does not use",
                f"remove it from {path}",
            )


@dataclass
class LlamaFactory(Messages):
    """Datasets of LLaMA-Factory's `dataset_info.json`; see `llama_factory.read_llama_factory`.

    Args:
        images: folder in which the paths of images start, within `path`, as LLaMA-Factory's `media_dir`; by
            default `path` itself.
    """

    function = "llama_factory:read_llama_factory"


@dataclass
class CocoCaptions(_BuiltIn):
    """COCO's caption files; see `coco.read_coco`.

    Args:
        images: folder in which every `file_name` starts, within `path`.
    """

    function = "coco:read_coco"
    kinds = ("captioning",)

    images: str | dict[str, str] = _folders("images")


@dataclass
class RandomSplit(_BuiltIn):
    """Images of one folder, split at random in two; see `image_lists.read_random_split`.

    Args:
        pattern: regular expression (Python's) for an image's whole path within `path`, with the group
            `label` for the class: `(?P<label>[^/]+)/.+`.
    """

    function = "image_lists:read_random_split"
    kinds = ("classification",)
    groups: ClassVar[tuple[str, ...]] = ("label",)

    pattern: str = field(kw_only=True)

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        try:
            groups = re.compile(self.pattern).groupindex
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(
                f"{path.name} has {self.pattern!r} under 'source.pattern', which is no regular expression "
                f"({error})",
                f"correct it in {path}",
            ) from error
        for group in self.groups:
            if group not in groups:
                raise RecipeError(
                    f"{path.name} has no group '{group}' in 'source.pattern'",
                    f"write (?P<{group}>...) where the {group} stands, in {path}",
                )


@dataclass
class ImageList(RandomSplit):
    r"""A text file with a line per image; see `image_lists.read_image_list`.

    Args:
        pattern: regular expression (Python's) for a whole line, with the groups `image` for the image's
            path and `label` for the class: `(?P<image>\S+) (?P<label>.+)`.
        images: folder in which the paths of images start, within `path`; by default `path` itself.
        suffix: what is appended to the group `image`, such as `.jpg`.
    """

    function = "image_lists:read_image_list"
    groups = ("image", "label")

    images: str | dict[str, str] = _folders("")
    suffix: str | None = ""


@dataclass
class CifarPython(_BuiltIn):
    """CIFAR-100's python version; see `pixel_arrays.read_cifar`."""

    function = "pixel_arrays:read_cifar"
    kinds = ("classification",)


@dataclass
class Idx(_BuiltIn):
    """MNIST's IDX files; see `pixel_arrays.read_idx`."""

    function = "pixel_arrays:read_idx"
    kinds = ("classification",)


@dataclass
class FlowersMat(_BuiltIn):
    """Oxford Flowers 102; see `matlab_files.read_flowers`.

    Args:
        images: folder of `image_00001.jpg` and so on, within `path`.
    """

    function = "matlab_files:read_flowers"
    kinds = ("classification",)

    images: str | dict[str, str] = _folders("jpg")


@dataclass
class CarsMat(_BuiltIn):
    """Stanford Cars; see `matlab_files.read_cars`.

    Args:
        images: folder in which every `fname` starts, within `path`; by default `path` itself.
    """

    function = "matlab_files:read_cars"
    kinds = ("classification",)

    images: str | dict[str, str] = _folders("")


@dataclass
class Rendered(Reader):
    """Images that are drawn; see `rendered`. They are drawn by `loading`, so `read` is not used.

    Args:
        task: the task that is drawn, one of those under "Tasks" in docs/tasks.md whose reader is `rendered`.
    """

    path: ClassVar[None] = None
    has_files = False

    task: str
