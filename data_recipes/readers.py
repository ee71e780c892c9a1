"""The base class of readers, the registry of readers, and the checks of a recipe's `source`."""

from __future__ import annotations

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

    A subclass is a dataclass. Its fields are the keys that a recipe may have under `source` in addition to
    `format`, with their types (text, numbers, bools, lists and mappings of these) and their defaults; a field
    without a default is required. The docstring's `Args` say what each key means. `check` may refuse values,
    and `read` reads a split.

    Args:
        path: folder of the files, under the data root or next to the recipe; null where whoever extends the
            recipe has to name it.
    """

    path: str | None = field(kw_only=True)

    #: The kinds of recipes that the format supports.
    kinds: ClassVar[tuple[str, ...]] = KINDS
    #: Whether `path` is a folder that must lie on this machine.
    has_files: ClassVar[bool] = True

    @classmethod
    def keys(cls) -> dict[str, Field]:
        """Return the keys that a source of this format may have, by name."""
        return {key.name: key for key in fields(cls)}

    def check(self, kind: str, path: Path) -> None:
        """Refuse values that cannot be used; keys and types of values are checked before.

        Args:
            kind: the recipe's kind.
            path: the recipe's YAML, for errors.

        Raises:
            RecipeError: a value cannot be used.
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
            recipe: the recipe; `recipe.splits[split]` names the file, folder or split of the source.
            split: one of `recipe.splits`.
            data_root: the folder under which `path` lies; see `places.set_folder`.
            problems: receives the errors of single records, which are then left out (see
                `errors.collect_errors`); if None, the first one is raised.

        Raises:
            RecipeError: a file is missing or malformed, or (without `problems`) a record is.
        """
        raise NotImplementedError


def _is_reader(value: Any) -> str | None:
    is_class = isinstance(value, type) and issubclass(value, Reader)
    return None if is_class else "it is no subclass of llava_keeplora_recipes.Reader"


#: The built-in formats are imported with `formats`, when the first of them is used.
READERS = Registry(
    "reader",
    "llava_keeplora.readers",
    {
        name: f"llava_keeplora_recipes.formats:{reader}"
        for name, reader in {
            "imagefolder": "ImageFolder",
            "parquet": "Parquet",
            "hub": "Hub",
            "table": "TableFile",
            "dataset": "DatasetObject",
            "llava_json": "LlavaJson",
            "messages": "Messages",
            "llama_factory": "LlamaFactory",
            "coco_captions": "CocoCaptions",
            "image_list": "ImageList",
            "random_split": "RandomSplit",
            "cifar_python": "CifarPython",
            "idx": "Idx",
            "flowers_mat": "FlowersMat",
            "cars_mat": "CarsMat",
            "mme": "Mme",
            "rendered": "Rendered",
        }.items()
    },
    _is_reader,
)


def check_source(source: Mapping[str, Any], kind: str, path: Path) -> None:
    """Check a recipe's `source` against its format.

    Args:
        source: the mapping under `source`.
        kind: the recipe's kind.
        path: the recipe's YAML, for errors.

    Raises:
        RecipeError: a key is unknown or missing, a value is invalid, or the format does not support the kind.
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
        if key not in source and is_required(declared):
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
    """Return the reader of a source that `check_source` accepts."""
    return READERS[source["format"]](**{key: value for key, value in source.items() if key != "format"})


def read_records(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read one split of a recipe whose examples are in files or on the Hub; see `Reader.read`.

    Raises:
        RecipeError: the data root, a file, a column or a field is missing or malformed; or a reader that is a
            plug-in failed, or returned something other than records.
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
    except Exception as error:  # a plug-in may raise anything
        raise RecipeError(
            f"the reader '{name}' failed on {what} ({type(error).__name__}: {error})",
            "correct the reader (`--debug` shows where it failed), or the data",
        ) from error
    if reason := _disqualified(records):
        raise RecipeError(f"the reader '{name}' gave no records for {what}: {reason}", "correct the reader")
    return records


def _disqualified(records: Any) -> str | None:
    """Return why a plug-in's result is no valid `Records`; None if it is."""
    if not isinstance(records, Records):
        return f"a {type(records).__name__}"
    names = ("labels", "questions", "answers", "meta", "histories", "videos")
    columns = {name: getattr(records, name) for name in names}
    for name, column in (columns | {"images": records.images.shown}).items():
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
    word = value_word(reader, key)
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


def value_word(reader: type[Reader], key: str) -> str:
    """Return the type of a key under `source` in words, for errors: `text`, `a list of fields`."""
    hint = typing.get_type_hints(reader)[key]
    return reader.keys()[key].metadata.get("word") or _word(hint)


def is_required(key: Field) -> bool:
    """Return whether a recipe must write a key under `source`."""
    return key.default is MISSING and key.default_factory is MISSING


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value of YAML is of a type; the items of lists and mappings are not checked."""
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
