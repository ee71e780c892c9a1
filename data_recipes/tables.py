"""Tables: parquet files and datasets on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import pyarrow.parquet
from huggingface_hub.constants import HF_HUB_CACHE

from .conversation_turn import Turn, from_turns, place_turn, with_system
from .errors import RecipeError, collect_errors, nearest
from .hub_layout import HubTable, load_hub_dataset
from .media import UNREAD, is_empty, refuse_unread_media, system_text
from .paths import data_root_of, describe_error, inside, own_path, set_folder, within
from .recipe import Recipe
from .records import Pictures, Records, picture_files
from .texts import answer_texts, described, identifier, only_answer

TEXT, LARGE_TEXT = datasets.Value("string"), datasets.Value("large_string")


def read_parquet(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Parquet files; a split is one pattern or several, its files read in the order of their names.

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
        found = [within(file, what, root) for file in sorted(folder.glob(pattern))]
        if not found:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' is not there: no '{folder / pattern}'",
                "add the file, or correct 'splits' in the recipe",
            )
        for file in found:
            if not file.is_file():
                raise RecipeError(
                    f"{what} names '{file}', which is no file", "correct 'splits' in the recipe"
                )
        repeated = set(found) & set(files)
        if repeated:
            raise RecipeError(
                f"{what} names '{min(repeated)}' more than once, by the pattern '{pattern}' and by another",
                "correct 'splits' in the recipe",
            )
        files += found
    files = _without_empty(files)
    if not files:
        raise RecipeError(f"{what} has no rows in its parquet files", "add examples")
    try:
        with _quiet():
            # a pattern again for datasets, so a folder named 'a[1]' has to be escaped
            table = datasets.load_dataset(
                "parquet", data_files=[glob.escape(str(f.absolute())) for f in files], split="train"
            )
    except Exception as error:  # datasets wraps whatever pyarrow raises
        cause = error.__cause__ or error
        raise RecipeError(
            f"the {split} split of '{recipe.name}' cannot be read as parquet ({describe_error(cause)})",
            f"replace {', '.join(f.name for f in files[:3])}",
        ) from error
    return _from_table(recipe, split, HubTable(table), folder, (root,), problems)


def _without_empty(files: list[Path]) -> list[Path]:
    """Leave out parquet files without rows, which datasets cannot read; broken ones are reported later."""

    def is_empty_table(file: Path) -> bool:
        try:
            return pyarrow.parquet.read_metadata(file).num_rows == 0
        except (OSError, ValueError, pyarrow.ArrowException):
            return False

    return [file for file in files if not is_empty_table(file)]


def read_hub(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """A dataset on the Hub, or a local folder in the Hub's layout if `source.path` is one.

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
    except Exception as error:  # the Hub client and datasets raise a dozen kinds; the first is reported
        # datasets wraps what a reader raises
        cause = error if isinstance(error, RecipeError) else error.__cause__ or error
        if isinstance(cause, RecipeError):
            raise cause from None
        raise RecipeError(
            f"Hub dataset '{target}' of recipe '{recipe.name}' cannot be loaded with the split "
            f"'{recipe.splits[split]}' ({describe_error(cause)})",
            "check the id, the split's name and the network, or use parquet files with 'format: parquet'",
        ) from error
    if local.is_dir():
        return _from_table(recipe, split, loaded, local, (local.resolve(),), problems)
    caches = tuple(Path(place).resolve() for place in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE))
    return _from_table(recipe, split, loaded, None, caches, problems)


def _from_table(
    recipe: Recipe,
    split: str,
    loaded: HubTable,
    folder: Path | None,
    roots: tuple[Path, ...],
    problems: list[RecipeError] | None,
) -> Records:
    """Records from a table's columns, by the names in `source.columns`.

    Args:
        folder: where paths in the table start; None for a table from the Hub.
        roots: folders that a path of a picture may lead into.
    """
    table = loaded.table
    columns = _columns(recipe, split, table)
    count, classify = len(table), recipe.kind == "classification"
    chats = "messages" in columns
    roles = ["id", *(["messages"] if chats else ["label"] if classify else ["question", "answers"])]
    cells = {role: _values(table, columns[role]) if role in columns else [None] * count for role in roles}
    unread = {c: _held(table, c) for c in UNREAD if c in table.column_names and c not in columns.values()}
    beside = {c: _values(table, c) for c in ("system", "tools") if chats and c in table.column_names}
    pictures = _pictures(recipe, split, table, columns, folder, roots)

    def record(row: int) -> tuple[str, Turn, Any, tuple[int, ...]]:
        what = f"row {row} of {recipe.name}/{split}"
        name = identifier(cells["id"][row], what) if "id" in columns else f"{split}-{row}"
        what, shown = f"record '{name}' in {recipe.name}/{split}", pictures.shown[row]
        if shown is None:
            raise RecipeError(
                f"{what} has other images in 'image' than in 'images'", "keep those that are meant"
            )
        if loaded.names_files and not shown:
            raise RecipeError(f"{what} has no 'file_name'", "name its picture's file, or remove the record")
        refuse_unread_media({column: values[row] for column, values in unread.items()}, what)
        if classify and not chats:
            return name, Turn("", []), cells["label"][row], shown
        if chats:
            system = system_text({column: values[row] for column, values in beside.items()}, what)
            turn = with_system(from_turns(cells["messages"][row], what), system, what)
        else:
            turn = _turn(cells["question"][row], cells["answers"][row], what)
        turn = place_turn(turn, len(shown), what)
        return name, turn, only_answer(turn.answers, what) if classify else None, shown

    found = collect_errors(record, range(count), problems)
    feature = table.features[columns["label"]] if classify and not chats else None
    return Records(
        ids=[name for name, _, _, _ in found],
        pictures=Pictures(pictures.dataset, pictures.cells, [shown for _, _, _, shown in found]),
        labels=[label for _, _, label, _ in found],
        label_names=list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        questions=[None if classify else turn.question for _, turn, _, _ in found],
        answers=[[] if classify else turn.answers for _, turn, _, _ in found],
        histories=[turn.history for _, turn, _, _ in found],
        left_out=loaded.left_out,
    )


def _turn(question: Any, answers: Any, what: str) -> Turn:
    if question is not None and not isinstance(question, str):
        raise RecipeError(
            f"{what} has {described(question)} as its question, and a question is text",
            "correct or remove the record",
        )
    return Turn(question or "", answer_texts(answers, what))


def _values(table: datasets.Dataset, column: str) -> list[Any]:
    """A column's values; numbers of 32 bits keep their own digits, 0.1 and not 0.10000000149011612."""
    try:
        arrow = _arrow(table, column)
        short = {pyarrow.float32(), pyarrow.float16()}
        values = arrow.to_pylist()
        if _leaf(arrow.type) in short:
            values = _short_digits(values)
        return values
    except (ValueError, pyarrow.ArrowException) as error:
        raise RecipeError(
            f"the column '{column}' cannot be read ({describe_error(error)})", "write the table anew"
        ) from error


def _held(table: datasets.Dataset, column: str) -> list[Any]:
    """What the cells of a column of media hold, without their bytes."""
    arrow = _arrow(table, column)
    leaf = _leaf(arrow.type)
    if not pyarrow.types.is_struct(leaf):
        return _values(table, column)
    count = arrow.is_valid() if arrow.type == leaf else pyarrow.compute.list_value_length(arrow)
    return [f"{int(n)} of them" if n else None for n in count.to_pylist()]


def _arrow(table: datasets.Dataset, column: str) -> pyarrow.ChunkedArray:
    return table.select_columns([column]).with_format("arrow")[:][column]


def _leaf(kind: pyarrow.DataType) -> pyarrow.DataType:
    types = pyarrow.types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _short_digits(value: Any) -> Any:
    if isinstance(value, list):
        return [_short_digits(v) for v in value]
    return value if value is None else float(str(np.float32(value)))


def _columns(recipe: Recipe, split: str, table: datasets.Dataset) -> dict[str, str]:
    """The table's column for every role that it has.

    Raises:
        RecipeError: a role that the kind needs, or that the recipe names, has no column.
    """
    named = recipe.source["columns"]
    if "messages" in named:
        needed = ["messages"]
    elif recipe.kind == "classification":
        needed = ["image", "label"]
    else:
        needed = ["image", "answers"] + ["question"] * (recipe.kind == "vqa")
    columns = {
        role: named.get(role, role) for role in ("id", "image", "label", "question", "answers")
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


def _pictures(
    recipe: Recipe,
    split: str,
    table: datasets.Dataset,
    columns: dict[str, str],
    folder: Path | None,
    roots: tuple[Path, ...],
) -> Pictures:
    """The pictures that a table's records show: of `image` and `images`, those of the one that holds some."""
    keep_empty = recipe.kind == "classification" and "images" not in columns
    named = [columns[role] for role in ("image", "images") if role in columns]
    if not named:
        return picture_files([[] for _ in range(len(table))])
    where = f"in the {split} split of '{recipe.name}'"
    held = [_column_of_pictures(f"column '{c}' {where}", table, c, folder, roots, keep_empty) for c in named]
    return held[0] if len(held) == 1 else _whichever(*held)


def _whichever(first: Pictures, second: Pictures) -> Pictures:
    """Each record's pictures from the one of two columns that shows some; None where both show others."""
    offset, lists = len(first.cells), [_as_lists(first), _as_lists(second)]
    rows = len(lists[0])
    cells = [(row, position or 0) for row, position in first.cells]
    cells += [(rows + row, position or 0) for row, position in second.cells]

    def choose(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
        if one and other and [_cell(first, i) for i in one] != [_cell(second, i) for i in other]:
            return None
        return one or tuple(offset + i for i in other)

    shown = [choose(one, other) for one, other in zip(first.shown, second.shown, strict=True)]
    return Pictures(datasets.concatenate_datasets(lists), cells, shown)


def _cell(pictures: Pictures, index: int) -> Any:
    row, position = pictures.cells[index]
    cell = pictures.dataset[row]["image"]
    return cell if position is None else cell[position]


def _as_lists(pictures: Pictures) -> datasets.Dataset:
    """Pictures as lists of pictures, without a copy of them."""
    features = datasets.Features({"image": datasets.List(datasets.Image(decode=False))})
    dataset = pictures.dataset
    if isinstance(dataset.features["image"], datasets.List | datasets.LargeList):
        return dataset.cast(features)
    chunks = dataset.with_format("arrow")[:]["image"].chunks
    ends = [pyarrow.array(range(len(chunk) + 1), pyarrow.int32()) for chunk in chunks]
    lists = [pyarrow.ListArray.from_arrays(*parts) for parts in zip(ends, chunks, strict=True)]
    table = pyarrow.table({"image": pyarrow.chunked_array(lists, features.arrow_schema.field("image").type)})
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _column_of_pictures(
    what: str,
    table: datasets.Dataset,
    column: str,
    folder: Path | None,
    roots: tuple[Path, ...],
    keep_empty: bool,
) -> Pictures:
    """The pictures of a column of images, of lists of images, or of paths in the task's folder; unread.

    An empty cell is a record without a picture, but in classification, which cannot do without, a broken one.
    """
    feature = table.features[column]
    lists = isinstance(feature, datasets.List | datasets.LargeList)
    if folder is not None and (feature.feature if lists else feature) in (TEXT, LARGE_TEXT):
        cells = [c if lists else [c] for c in table[column]]
        names = [[c for c in own or [] if not is_empty(c)] for own in cells]
        return picture_files([[inside(folder, name, what, roots[0]) for name in own] for own in names])
    undecoded = datasets.Image(decode=False)
    try:
        images = table.select_columns([column]).cast_column(
            column, datasets.List(undecoded) if lists else undecoded
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(
            f"the {what} holds no images ({describe_error(error)})",
            "name the right one with 'source.columns.image' in the recipe",
        ) from error
    if column != "image":
        images = images.rename_column(column, "image")
    _refuse_paths(images, lists, what, roots)
    return _located(images, lists, keep_empty)


def _refuse_paths(images: datasets.Dataset, lists: bool, what: str, roots: tuple[Path, ...]) -> None:
    """A cell without bytes names a file, which may not lie just anywhere."""
    cells = images.with_format("arrow")[:]["image"]
    cells = pyarrow.compute.list_flatten(cells) if lists else cells
    bare = pyarrow.compute.is_null(pyarrow.compute.struct_field(cells, "bytes"))
    for path in (
        pyarrow.compute.filter(pyarrow.compute.struct_field(cells, "path"), bare).drop_null().to_pylist()
    ):
        within(Path(path), what, *roots)


def _located(images: datasets.Dataset, lists: bool, keep_empty: bool) -> Pictures:
    # arrow counts and finds the empty cells without reading a picture
    arrow = images.with_format("arrow")[:]["image"]
    cells: list[tuple[int, int | None]] = []
    shown = []
    if lists:
        counts = [n or 0 for n in pyarrow.compute.list_value_length(arrow).to_pylist()]
        for row, count in enumerate(counts):
            shown.append(tuple(range(len(cells), len(cells) + count)))
            cells += [(row, position) for position in range(count)]
        return Pictures(images, cells, shown)
    for row, empty in enumerate(arrow.is_null().to_pylist()):
        present = keep_empty or not empty
        shown.append((len(cells),) * present)
        cells += [(row, None)] * present
    return Pictures(images, cells, shown)


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
