"""Tables: parquet files and datasets on the Hub."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from huggingface_hub.constants import HF_HUB_CACHE

from .choices import ask_choice, option_set
from .conversation_turn import Turn, from_turns, place_turn, with_system
from .errors import RecipeError, collect_errors, nearest
from .hub_layout import HubTable, load_hub_dataset
from .media import UNREAD, VIDEOS, refuse_unread_media, system_text
from .parquet_files import BATCH_SIZE, WITHOUT_ROWS, begins_without_rows, count_rows, refuse_mixed_booleans
from .paths import data_root_of, describe_error, inside, own_path, set_folder, within
from .recipe import Recipe
from .records import Records
from .strict_json import parse_json
from .table_images import arrow_column, read_images
from .texts import answer_texts, described, identifier, only_answer

log = logging.getLogger(__name__)


def read_parquet(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read parquet files; a split is one glob pattern or several, each read in the order of its files' names.

    Raises:
        RecipeError: a file or a column is missing, or a file is not parquet.
    """
    folder, root = set_folder(recipe, data_root), data_root_of(recipe, data_root)
    what = f"split '{split}' of recipe '{recipe.name}'"
    patterns = recipe.splits[split]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in patterns:
        inside(folder, pattern, what, root)
        matches = [within(file, what, root) for file in sorted(folder.glob(pattern))]
        if not matches:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' is not there: no '{folder / pattern}'",
                "add the file, or correct 'splits' in the recipe",
            )
        for file in matches:
            if not file.is_file():
                raise RecipeError(
                    f"{what} names '{file}', which is no file", "correct 'splits' in the recipe"
                )
        repeated = set(matches) & set(files)
        if repeated:
            raise RecipeError(
                f"{what} names '{min(repeated)}' more than once, by the pattern '{pattern}' and by another",
                "correct 'splits' in the recipe",
            )
        files += matches
    rows = {file: count_rows(file) for file in files}
    files = [file for file in files if rows[file] != 0]
    if not files:
        raise RecipeError(f"{what} has no rows in its parquet files", "add examples")
    refuse_mixed_booleans(files)
    left_out = {WITHOUT_ROWS: [file.relative_to(folder).as_posix() for file in rows if file not in files]}
    try:
        with _quiet():
            # datasets takes patterns, so a folder named 'a[1]' has to be escaped
            table = datasets.load_dataset(
                "parquet",
                data_files=[glob.escape(str(f.absolute())) for f in files],
                split="train",
                **({"batch_size": BATCH_SIZE} if any(map(begins_without_rows, files)) else {}),
            )
    except Exception as error:  # datasets wraps whatever pyarrow raises
        cause = error.__cause__ or error
        raise RecipeError(
            f"the {split} split of '{recipe.name}' cannot be read as parquet ({describe_error(cause)})",
            f"replace {', '.join(f.name for f in files[:3])}",
        ) from error
    loaded = HubTable(table, left_out if left_out[WITHOUT_ROWS] else {})
    return from_table(recipe, split, loaded, folder, (root,), problems)


def read_hub(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read a dataset on the Hub, or a local folder in the Hub's layout if `source.path` is one.

    Raises:
        RecipeError: no dataset is named, it cannot be loaded, or a column is missing.
    """
    path = own_path(recipe)
    local = path
    if not path.is_absolute() and (base := data_root if data_root is not None else recipe.folder) is not None:
        local = Path(base).expanduser() / path
    target = str(local) if local.is_dir() else recipe.source["path"]
    if not isinstance(recipe.splits[split], str):
        raise RecipeError(
            f"recipe '{recipe.name}' has {recipe.splits[split]!r} as its {split} split, and a dataset in the "
            "Hub's layout has splits by name",
            "write one name, or names with a plus: train+validation",
        )
    try:
        with _quiet():
            loaded = load_hub_dataset(
                target,
                recipe.source["config"],
                recipe.splits[split],
                recipe.source["revision"],
                recipe.source["columns"].get("label", "label"),
            )
    except Exception as error:  # the Hub client and datasets raise a dozen types; the first is reported
        # datasets wraps errors of a reader
        cause = error if isinstance(error, RecipeError) else error.__cause__ or error
        if isinstance(cause, RecipeError):
            raise cause from None
        raise RecipeError(
            f"Hub dataset '{target}' of recipe '{recipe.name}' cannot be loaded with the split "
            f"'{recipe.splits[split]}' ({describe_error(cause)})",
            "check the id, the split's name and the network, or use parquet files with 'format: parquet'",
        ) from error
    if local.is_dir():
        return from_table(recipe, split, loaded, local, (local.resolve(),), problems)
    caches = tuple(Path(place).resolve() for place in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE))
    return from_table(recipe, split, loaded, None, caches, problems)


def from_table(
    recipe: Recipe,
    split: str,
    loaded: HubTable,
    folder: Path | None,
    roots: tuple[Path, ...],
    problems: list[RecipeError] | None,
) -> Records:
    """Return the records of a table's columns, by the names in `source.columns`.

    Args:
        folder: folder to which paths in the table are relative; None for a table from the Hub.
        roots: folders outside of which a path of an image is refused.
    """
    table = _rows_of_task(recipe, split, loaded.table)
    columns = _columns(recipe, split, table)
    count, classify = len(table), recipe.kind == "classification"
    chats = "messages" in columns
    roles = ["id", *(["messages"] if chats else ["label"] if classify else ["question", "answers"])]
    cells = {role: _values(table, columns[role]) if role in columns else [None] * count for role in roles}
    media = [c for c in (*VIDEOS, *UNREAD) if c in table.column_names and c not in columns.values()]
    unread = {c: _held(table, c) for c in media}
    finish = _choices_and_meta(recipe, split, table, columns)
    chat_columns = {c: _values(table, c) for c in ("system", "tools") if chats and c in table.column_names}
    source_images, faults = read_images(recipe, split, table, columns, folder, roots)

    def record(row: int) -> tuple[str, Turn, Any, tuple[int, ...], dict[str, Any]]:
        what = f"row {row} of {recipe.name}/{split}"
        name = identifier(cells["id"][row], what) if "id" in columns else f"{split}-{row}"
        what, images = f"record '{name}' in {recipe.name}/{split}", source_images.shown[row]
        if row in faults:
            raise RecipeError(f"{what} {faults[row].problem}", faults[row].cure)
        if loaded.names_files and not images:
            raise RecipeError(f"{what} has no 'file_name'", "name its image's file, or remove the record")
        refuse_unread_media({column: values[row] for column, values in unread.items()}, what)
        if classify and not chats:
            return name, Turn("", []), cells["label"][row], images, {}
        if chats:
            system = system_text({column: values[row] for column, values in chat_columns.items()}, what)
            turn = with_system(from_turns(cells["messages"][row], what), system, what)
        else:
            turn = _turn(cells["question"][row], cells["answers"][row], what)
        turn, meta = finish(row, turn, what)
        turn = place_turn(turn, len(images), what)
        return name, turn, only_answer(turn.answers, what) if classify else None, images, meta

    records = collect_errors(record, range(count), problems)
    feature = table.features[columns["label"]] if classify and not chats else None
    return Records(
        ids=[name for name, *_ in records],
        images=replace(source_images, shown=[images for *_, images, _ in records]),
        labels=[label for _, _, label, *_ in records],
        label_names=list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        questions=[None if classify else turn.question for _, turn, *_ in records],
        answers=[[] if classify else turn.answers for _, turn, *_ in records],
        meta=[meta for *_, meta in records],
        histories=[turn.history for _, turn, *_ in records],
        left_out=loaded.left_out,
    )


def _choices_and_meta(
    recipe: Recipe, split: str, table: datasets.Dataset, columns: dict[str, str]
) -> Callable[[int, Turn, str], tuple[Turn, dict[str, Any]]]:
    """Return a function of (row, turn, record) that puts the options below a question, and adds its meta."""
    choices = [_values(table, column) for column in _named(recipe, split, table, "options")]
    metas = {c.replace("-", "_"): _values(table, c) for c in _named(recipe, split, table, "meta")}
    hints = _values(table, columns["hint"]) if "hint" in columns else [None] * len(table)

    def finish(row: int, turn: Turn, what: str) -> tuple[Turn, dict[str, Any]]:
        meta = {name: values[row] for name, values in metas.items()}
        if not choices:
            return turn, meta
        options = option_set([values[row] for values in choices], what)
        question = ask_choice(turn.question, hints[row], options)
        return replace(turn, question=question), meta | {"option_set": options}

    return finish


def _named(recipe: Recipe, split: str, table: datasets.Dataset, key: str) -> list[str]:
    """Return the columns that the recipe lists under a key of its source.

    Raises:
        RecipeError: the table lacks one of them.
    """
    names = list(recipe.source.get(key) or ())
    for name in names:
        if name not in table.column_names:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' has no column '{name}', which 'source.{key}' names",
                nearest(name, table.column_names),
            )
    return names


def _rows_of_task(recipe: Recipe, split: str, table: datasets.Dataset) -> datasets.Dataset:
    """Return the rows that have the values of `source.where`; the number of others is logged."""
    where = recipe.source.get("where") or {}
    cells = {name: _values(table, name) for name in _named(recipe, split, table, "where")}
    rows = [i for i in range(len(table)) if all(str(cells[name][i]) == where[name] for name in where)]
    if len(rows) == len(table):
        return table
    log.info(
        "%d of %d rows of %s/%s have other values than %s and are no part of the task",
        *(len(table) - len(rows), len(table), recipe.name, split, where),
    )
    return table.select(rows)


def _turn(question: Any, answers: Any, what: str) -> Turn:
    if question is not None and not isinstance(question, str):
        raise RecipeError(
            f"{what} has {described(question)} as its question, and a question is text",
            "correct or remove the record",
        )
    return Turn(question or "", answer_texts(answers, what))


def _values(table: datasets.Dataset, column: str) -> list[Any]:
    """Return a column's values; 32-bit numbers with their shortest digits, 0.1 and not 0.10000000149011612.

    Raises:
        RecipeError: the column cannot be read.
    """
    try:
        arrow = arrow_column(table, column)
        short = {pyarrow.float32(), pyarrow.float16()}
        values = arrow.to_pylist()
        if _leaf(arrow.type) in short:
            values = _short_digits(values)
        return [_unquoted(value, table.features[column]) for value in values]
    except (ValueError, pyarrow.ArrowException) as error:
        raise RecipeError(
            f"the column '{column}' cannot be read ({describe_error(error)})", "write the table anew"
        ) from error


def _held(table: datasets.Dataset, column: str) -> list[Any]:
    """Return the cells of a column of media without their bytes: a path, a number of media, or None."""
    arrow = arrow_column(table, column)
    leaf = _leaf(arrow.type)
    if not pyarrow.types.is_struct(leaf):
        return _values(table, column)
    count = arrow.is_valid() if arrow.type == leaf else pyarrow.compute.list_value_length(arrow)
    return [f"{int(n)} of them" if n else None for n in count.to_pylist()]


def _leaf(kind: pyarrow.DataType) -> pyarrow.DataType:
    types = pyarrow.types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _unquoted(value: Any, feature: Any) -> Any:
    """Parse the parts of a value that datasets stores as JSON because their type changes between rows."""
    if isinstance(feature, getattr(datasets, "Json", ())):
        return value if value is None else parse_json(value)
    if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(value, list):
        return [_unquoted(item, feature.feature) for item in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _unquoted(item, feature.get(key)) for key, item in value.items()}
    return value


def _short_digits(value: Any) -> Any:
    if isinstance(value, list):
        return [_short_digits(v) for v in value]
    return value if value is None else float(str(np.float32(value)))


def _columns(recipe: Recipe, split: str, table: datasets.Dataset) -> dict[str, str]:
    """Return role → column of the table, for the roles that it has.

    Raises:
        RecipeError: a role that the task's kind requires, or that the recipe names, has no column.
    """
    named = recipe.source["columns"]
    if "messages" in named:
        needed = ["messages"]
    elif recipe.kind == "classification":
        needed = ["image", "label"]
    else:
        needed = ["image", "answers"] + ["question"] * (recipe.kind == "vqa")
    columns = {
        role: named.get(role, role) for role in ("id", "image", "label", "question", "answers", "hint")
    } | named
    if "image" not in named and "image" not in table.column_names and "images" in table.column_names:
        columns["image"] = "images"
    for role in sorted({*needed, *named}):
        if columns[role] not in table.column_names:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' has no column '{columns[role]}'",
                f"{nearest(columns[role], table.column_names)}; set it with 'source.columns.{role}' in the "
                "recipe",
            )
    if "image" not in named and {"image", "images"} <= set(table.column_names):
        columns["images"] = "images"
    return {role: column for role, column in columns.items() if column in table.column_names}


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable datasets' progress bars, which appear for work of milliseconds too."""
    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
