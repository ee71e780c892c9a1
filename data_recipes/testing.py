"""Check of the contract of readers, which third parties can run on theirs: `check_reader`."""

from __future__ import annotations

import shutil
import tempfile
import typing
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .loading import load_split
from .paths import set_folder
from .readers import KINDS, READERS, Reader, check_source, read_records
from .recipe import Recipe
from .recipe_files import load_recipe
from .records import Records, is_history


def check_reader(recipe: Recipe | str | Path, data_root: str | Path | None = None) -> None:
    """Check that the reader of a recipe's format keeps the contract.

    The rules: its fields declare its keys, and other keys and values of other types are refused; reading a
    split twice gives the same records, whatever the folder of the files; ids are different texts; a record
    has what its kind needs; and missing files are refused with a `RecipeError`.

    Args:
        recipe: a recipe whose `source.format` names the reader, or its YAML; its data must be valid, and
        small,
            as they are copied.
        data_root: the folder to which the data's path is relative; None for data next to the YAML.

    Raises:
        AssertionError: the reader breaks a rule, which the message names.
        RecipeError: the recipe, or its data, cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    reader = READERS[recipe.source["format"]]
    what = f"the reader '{reader.__name__}'"
    _check_class(reader, what)
    _check_keys(recipe, what)
    for split in recipe.splits:
        records = read_records(recipe, split, data_root)
        _check_records(records, recipe, f"{what} on the split '{split}'")
        again = [read_records(recipe, split, data_root), read_records(recipe, split, data_root, [])]
        assert all(_content(records) == _content(other) for other in again), (
            f"{what} reads '{split}' otherwise twice"
        )
        assert load_split(recipe, split, data_root).ids == records.ids, (
            f"the records of {what} cannot be loaded"
        )
    if reader.has_files:
        _check_places(recipe, data_root, what)


def _check_class(reader: type[Reader], what: str) -> None:
    assert is_dataclass(reader) and issubclass(reader, Reader), f"{what} must be a dataclass and a Reader"
    assert reader.kinds and set(reader.kinds) <= set(KINDS), f"the kinds of {what} must be some of {KINDS}"
    hints = typing.get_type_hints(reader)
    for key in reader.keys():
        assert key != "format" and key in hints, f"{what} cannot have the key '{key}'"


def _check_keys(recipe: Recipe, what: str) -> None:
    yaml = Path("recipe.yaml")
    check_source(recipe.source, recipe.kind, yaml)
    keys = READERS[recipe.source["format"]].keys()
    unknown = recipe.source | {"an_unknown_key": "x"}
    _check_refused(f"an unknown key of {what}", lambda: check_source(unknown, recipe.kind, yaml))
    for key in keys:
        other = recipe.source | {key: {1, 2}}  # a set is a value of no key
        _check_refused(
            f"a value of another type under '{key}' of {what}",
            lambda other=other: check_source(other, recipe.kind, yaml),
        )


def _check_records(records: Records, recipe: Recipe, what: str) -> None:
    assert isinstance(records, Records), f"{what} gives a {type(records).__name__}, no Records"
    count = len(records.ids)
    assert count, f"{what} finds no records"
    names = ("labels", "questions", "answers", "meta", "histories", "videos")
    columns = {name: getattr(records, name) for name in names}
    for name, column in (columns | {"images.shown": records.images.shown}).items():
        assert len(column) == count, f"{what} gives {count} ids and {len(column)} {name}"
    assert all(isinstance(name, str) and name for name in records.ids), f"{what} gives an id that is no text"
    assert len(set(records.ids)) == count, f"{what} gives an id twice"
    assert all(map(is_history, records.histories)), f"{what} gives a history out of order"
    cells = range(len(records.images.cells))
    assert all(index in cells for shown in records.images.shown for index in shown), (
        f"{what} shows an image that is not there"
    )
    for label, question, answers in zip(records.labels, records.questions, records.answers, strict=True):
        if recipe.kind == "classification":
            assert label is not None, f"{what} gives a record without a label"
        else:
            assert label is None and answers, f"{what} gives a record without an answer, or with a label"
            assert all(isinstance(answer, str) for answer in answers), (
                f"{what} gives an answer that is no text"
            )
            assert question is None or isinstance(question, str), f"{what} gives a question that is no text"


def _check_places(recipe: Recipe, data_root: str | Path | None, what: str) -> None:
    split = next(iter(recipe.splits))
    records = read_records(recipe, split, data_root)
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder) / "elsewhere"
        shutil.copytree(set_folder(recipe, data_root), elsewhere)
        moved = replace(recipe, source=recipe.source | {"path": str(elsewhere)})
        assert _labels(read_records(moved, split, folder)) == _labels(records), (
            f"{what} reads a moved folder otherwise"
        )
        for path in [path for path in elsewhere.rglob("*") if path.is_file()]:
            path.unlink()
        _check_refused(f"a folder without its files, for {what}", lambda: load_split(moved, split, folder))
        shutil.rmtree(elsewhere)
        _check_refused(f"a folder that is not there, for {what}", lambda: read_records(moved, split, folder))


def _labels(records: Records) -> tuple[Any, ...]:
    return (
        records.ids,
        records.labels,
        records.questions,
        records.answers,
        records.meta,
        records.histories,
        records.videos,
        records.images.shown,
    )


def _content(records: Records) -> tuple[Any, ...]:
    return *_labels(records), records.label_names, records.images.cells, records.images.dataset.to_dict()


def _check_refused(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1, f"{what} is refused in more than one sentence"
        return
    raise AssertionError(f"{what} is not refused with a RecipeError")
