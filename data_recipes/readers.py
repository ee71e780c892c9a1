"""The formats that a recipe's source can have: a dataclass each, whose fields are the keys under `source`."""

from __future__ import annotations

import importlib
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar

from .errors import RecipeError, nearest
from .recipe import Recipe
from .records import Records, is_history
from .registry import SEPARATOR, PluginError, Registry

KINDS = ("classification", "vqa", "captioning")
#: What a table's columns can be.
COLUMNS = ("id", "image", "label", "question", "answers", "messages")
#: Type of a key's value → the sentence's word for it, where the field has no other.
WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


@dataclass
class Reader:
    """A source of examples; one subclass per format.

    A subclass is a dataclass. Its fields are the keys that a recipe may write under `source` beside `format`,
    with their types (text, numbers, bools, lists and mappings of these) and their defaults; a field without a
    default must be written. `check` may refuse values, and `read` reads a split.

    Args:
        path: the folder of the files, under the data root or beside the recipe; None if the user has to say
            it.
    """

    path: str | None = field(kw_only=True)

    #: The kinds of recipes that the format can hold.
    kinds: ClassVar[tuple[str, ...]] = KINDS
    #: Whether `path` is a folder that must lie on this machine.
    has_files: ClassVar[bool] = True

    @classmethod
    def keys(cls) -> dict[str, Field]:
        """Return the keys that a source of this format may have, by name."""
        return {key.name: key for key in fields(cls)}

    def check(self, kind: str, path: Path) -> None:
        """Refuse values that cannot be used; the keys and the types of their values are right already.

        Args:
            kind: the recipe's.
            path: the recipe's YAML, for the error's sentence.

        Raises:
            RecipeError: for a value that cannot be used.
        """

    def read(
        self,
        recipe: Recipe,
        split: str,
        data_root: str | Path | None,
        problems: list[RecipeError] | None = None,
    ) -> Records:
        """Read one split.

        Args:
            recipe: whose source this is; `recipe.splits[split]` names the file, folder or split of the
                source.
            split: one of `recipe.splits`.
            data_root: the folder under which `path` lies; see `places.set_folder`.
            problems: collects what is wrong with single records, which are left out (see
                `errors.collect_errors`); None raises.

        Raises:
            RecipeError: a file is missing or malformed, or (without `problems`) a record is.
        """
        raise NotImplementedError


class _BuiltIn(Reader):
    """A format of this package; `function` reads it, as `module:name`, and is imported when it is used."""

    function: ClassVar[str]

    def read(
        self,
        recipe: Recipe,
        split: str,
        data_root: str | Path | None,
        problems: list[RecipeError] | None = None,
    ) -> Records:
        """See `Reader.read`."""
        module, _, name = self.function.partition(SEPARATOR)
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(
            recipe, split, data_root, problems
        )


def _mapping(word: str = "a mapping") -> Any:
    return field(default_factory=dict, metadata={"word": word})


def _list(word: str) -> Any:
    return field(default_factory=list, metadata={"word": word})


def _folders(default: str) -> Any:
    return field(default=default, metadata={"word": "a folder, or a mapping from splits to folders"})


@dataclass
class Rendered(Reader):
    """Pictures that are drawn; see `rendered`. `loading` draws them, so there is nothing to read."""

    path: ClassVar[None] = None
    has_files = False

    task: str | None = None


@dataclass
class _Table(_BuiltIn):
    columns: dict[str, str] = _mapping()

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        for key in self.columns:
            if key not in COLUMNS:
                raise RecipeError(
                    f"{path.name} has the unknown key 'source.columns.{key}'", nearest(key, COLUMNS)
                )


@dataclass
class Parquet(_Table):
    """See `tables.read_parquet`."""

    function = "tables:read_parquet"


@dataclass
class Hub(_Table):
    """See `tables.read_hub`."""

    function = "tables:read_hub"
    has_files = False

    config: str | None = None
    revision: str | None = None


@dataclass
class ImageFolder(_BuiltIn):
    """See `image_folder.read_image_folder`."""

    function = "image_folder:read_image_folder"
    kinds = ("classification",)


@dataclass
class Messages(_BuiltIn):
    """See `conversations.read_messages`."""

    function = "conversations:read_messages"

    images: str | dict[str, str] = _folders("")
    positional_ids: list[str] = _list("a list of splits")
    meta: list[str] = _list("a list of fields")


@dataclass
class LlavaJson(Messages):
    """See `conversations.read_llava`."""

    function = "conversations:read_llava"

    references: dict[str, str] = _mapping("a mapping from splits to files")
    answer: str | None = "answer"

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        if self.references and kind == "classification":
            raise RecipeError(
                f"{path.name} has 'source.references', which a classification recipe does not use",
                f"remove it from {path}",
            )


@dataclass
class CocoCaptions(_BuiltIn):
    """See `coco.read_coco`."""

    function = "coco:read_coco"
    kinds = ("captioning",)

    images: str | dict[str, str] = _folders("images")


@dataclass
class RandomSplit(_BuiltIn):
    """See `image_lists.read_random_split`.

    Args:
        pattern: a regular expression with the groups that `groups` names.
    """

    function = "image_lists:read_random_split"
    kinds = ("classification",)
    groups: ClassVar[tuple[str, ...]] = ("label",)

    pattern: str | None = None

    def check(self, kind: str, path: Path) -> None:
        """See `Reader.check`."""
        pattern = self.pattern or ""
        try:
            groups = re.compile(pattern).groupindex
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(
                f"{path.name} has {pattern!r} under 'source.pattern', which is no regular expression "
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
    """See `image_lists.read_image_list`."""

    function = "image_lists:read_image_list"
    groups = ("image", "label")

    images: str | dict[str, str] = _folders("")
    suffix: str | None = ""


@dataclass
class CifarPython(_BuiltIn):
    """See `pixel_arrays.read_cifar`."""

    function = "pixel_arrays:read_cifar"
    kinds = ("classification",)


@dataclass
class Idx(_BuiltIn):
    """See `pixel_arrays.read_idx`."""

    function = "pixel_arrays:read_idx"
    kinds = ("classification",)


@dataclass
class FlowersMat(_BuiltIn):
    """See `matlab_files.read_flowers`."""

    function = "matlab_files:read_flowers"
    kinds = ("classification",)

    images: str | dict[str, str] = _folders("jpg")


@dataclass
class CarsMat(_BuiltIn):
    """See `matlab_files.read_cars`."""

    function = "matlab_files:read_cars"
    kinds = ("classification",)

    images: str | dict[str, str] = _folders("")


def _is_reader(value: Any) -> str | None:
    is_class = isinstance(value, type) and issubclass(value, Reader)
    return None if is_class else "it is no subclass of llava_keeplora_recipes.Reader"


READERS = Registry("reader", "llava_keeplora.readers", {}, _is_reader)
READERS.update(
    {
        "rendered": Rendered,
        "parquet": Parquet,
        "hub": Hub,
        "imagefolder": ImageFolder,
        "llava_json": LlavaJson,
        "messages": Messages,
        "coco_captions": CocoCaptions,
        "image_list": ImageList,
        "random_split": RandomSplit,
        "cifar_python": CifarPython,
        "idx": Idx,
        "flowers_mat": FlowersMat,
        "cars_mat": CarsMat,
    }
)


def check_source(source: Mapping[str, Any], kind: str, path: Path) -> None:
    """Refuse what a source of its format cannot say.

    Args:
        source: what a recipe says under `source`.
        kind: the recipe's.
        path: the recipe's YAML, for the error's sentence.

    Raises:
        RecipeError: names the key, what is wrong with it, and the cure.
    """
    name = source.get("format")
    reader = _class_of(name, path)
    keys = reader.keys()
    for key, value in source.items():
        if key == "format":
            continue
        if key not in keys:
            raise RecipeError(
                f"{path.name} has the unknown key 'source.{key}' for format {name}",
                nearest(key, ["format", *keys]),
            )
        _check_value(reader, key, value, path)
    for key, declared in keys.items():
        if key not in source and declared.default is MISSING and declared.default_factory is MISSING:
            raise RecipeError(
                f"{path.name} lacks the key 'source.{key}'", f"add '{key}:' under 'source' in {path}"
            )
    if kind not in reader.kinds:
        raise RecipeError(
            f"{path.name} is of the kind {kind}, which the format {name} does not hold",
            f"use {reader.kinds[0]}, or another format",
        )
    make_reader(source).check(kind, path)


def make_reader(source: Mapping[str, Any]) -> Reader:
    """Return the reader of a source that `check_source` let pass."""
    return READERS[source["format"]](**{key: value for key, value in source.items() if key != "format"})


def read_records(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read one split of a recipe whose examples lie in files or on the Hub; see `Reader.read`.

    Raises:
        RecipeError: the data root, a file, a column or a field is missing or malformed; or a reader that is a
            plug-in failed, or gave something else than records.
    """
    name = recipe.source["format"]
    reader = make_reader(recipe.source)
    if not READERS.is_plugin(name):
        return reader.read(recipe, split, data_root, problems)
    what = f"the {split} split of '{recipe.name}'"
    try:
        records = reader.read(recipe, split, data_root, problems)
    except RecipeError:
        raise
    except Exception as error:  # a reader of somebody else's may raise anything
        raise RecipeError(
            f"the reader '{name}' failed on {what} ({type(error).__name__}: {error})",
            "correct the reader (`--debug` shows where it failed), or the data",
        ) from error
    if reason := _disqualified(records):
        raise RecipeError(f"the reader '{name}' gave no records for {what}: {reason}", "correct the reader")
    return records


def _disqualified(records: Any) -> str | None:
    """Return why something is no whole `Records`, None where it is."""
    if not isinstance(records, Records):
        return f"a {type(records).__name__}"
    names = ("labels", "questions", "answers", "meta", "histories")
    columns = {name: getattr(records, name) for name in names}
    for name, column in (columns | {"pictures": records.pictures.shown}).items():
        if len(column) != len(records.ids):
            return f"{len(records.ids)} ids and {len(column)} {name}"
    if not all(isinstance(name, str) for name in records.ids):
        return "an id that is no text"
    if not all(map(is_history, records.histories)):
        return "a history that is not a tuple of messages, questions and answers by turns"
    return None


def _class_of(name: Any, path: Path) -> type[Reader]:
    try:
        return READERS[name if isinstance(name, str) else str(name)]
    except PluginError as error:
        if SEPARATOR in str(name):
            raise RecipeError(f"{path.name} cannot be read: {error.problem}", error.cure) from error
        raise RecipeError(
            f"{path.name} has the source format '{name}'", nearest(str(name), READERS)
        ) from error


def _check_value(reader: type[Reader], key: str, value: Any, path: Path) -> None:
    hint = typing.get_type_hints(reader)[key]
    word = reader.keys()[key].metadata.get("word") or _word(hint)
    if not _is_of(value, hint):
        raise RecipeError(
            f"{path.name} has {value!r} under 'source.{key}', which is not {word}",
            f"write {word} there, in {path}",
        )
    of_text = any(typing.get_args(option)[-1:] == (str,) for option in _options(hint))
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner if of_text else ():
        if not isinstance(part, str):
            raise RecipeError(
                f"{path.name} has {part!r} under 'source.{key}', which YAML does not read as text",
                "put quotes around it",
            )


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value of YAML is of a type; what lists and mappings hold is not looked at."""
    for option in _options(hint):
        kind = typing.get_origin(option) or option
        if kind is Any or (kind is float and isinstance(value, int) and not isinstance(value, bool)):
            return True
        if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return True
    return False


def _word(hint: Any) -> str:
    kinds = [typing.get_origin(option) or option for option in _options(hint)]
    return " or ".join(
        WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds if kind is not type(None)
    )
