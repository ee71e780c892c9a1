"""Tables: parquet files and datasets on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute
from huggingface_hub.constants import HF_HUB_CACHE

from .errors import RecipeError, nearest, sift
from .places import data_root_of, inside, own_path, set_folder, told, within
from .records import Pictures, Records, picture_files
from .turns import Turn, check_markers, from_messages

if TYPE_CHECKING:
    from .recipe import Recipe

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
            f"the {split} split of '{recipe.name}' cannot be read as parquet ({told(cause)})",
            f"replace {', '.join(f.name for f in files[:3])}",
        ) from error
    return _from_table(recipe, split, table, folder, (root,), problems)


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
            f"'{recipe.splits[split]}' ({told(error)})",
            "check the id, the split's name and the network, or use parquet files with 'format: parquet'",
        ) from error
    if local.is_dir():
        return _from_table(recipe, split, table, local, (local.resolve(),), problems)
    caches = tuple(Path(place).resolve() for place in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE))
    return _from_table(recipe, split, table, None, caches, problems)


def _from_table(
    recipe: Recipe, split: str, table: datasets.Dataset, folder: Path | None, roots: tuple[Path, ...], problems: list[RecipeError] | None
) -> Records:
    """Records from a table's columns, by the names in `source.columns`.

    Args:
        folder: where paths in the table start; None for a table from the Hub.
        roots: folders that a path of a picture may lead into.
    """
    columns = _columns(recipe, split, table)
    count = len(table)

    def values(role: str) -> list[Any]:
        return table[columns[role]][:] if role in columns else [None] * count

    ids = [str(i) for i in values("id")] if "id" in columns else [f"{split}-{i}" for i in range(count)]
    pictures = _pictures(recipe, split, table, columns.get("image"), folder, roots)
    if "messages" in columns:
        return _from_messages(recipe, ids, values("messages"), pictures, split, problems)
    classify = recipe.kind == "classification"
    feature = table.features[columns["label"]] if classify else None
    answers = [[]] * count if classify else [a if isinstance(a, list) else [a] for a in values("answers")]
    return Records(
        ids=ids,
        pictures=pictures,
        labels=values("label") if classify else [None] * count,
        label_names=list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        questions=[None] * count if classify else values("question"),
        answers=answers,
    )


def _columns(recipe: Recipe, split: str, table: datasets.Dataset) -> dict[str, str]:
    """The table's column for every role that it has.

    Raises:
        RecipeError: a role that the kind needs, or that the recipe names, has no column.
    """
    named = recipe.source.get("columns", {})
    if "messages" in named:
        needed = ["messages"]
    elif recipe.kind == "classification":
        needed = ["image", "label"]
    else:
        needed = ["image", "answers"] + ["question"] * (recipe.kind == "vqa")
    columns = {role: named.get(role, role) for role in ("id", "image", "label", "question", "answers")} | named
    if "image" not in named and "image" not in table.column_names and "images" in table.column_names:
        columns["image"] = "images"
    for role in sorted({*needed, *named}):
        if columns[role] not in table.column_names:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' has no column '{columns[role]}'",
                f"{nearest(columns[role], table.column_names)}; set it with 'source.columns.{role}' in the recipe",
            )
    return {role: column for role, column in columns.items() if column in table.column_names}


def _from_messages(
    recipe: Recipe,
    ids: list[str],
    chats: list[Any],
    pictures: Pictures,
    split: str,
    problems: list[RecipeError] | None,
) -> Records:
    def record(item: tuple[str, Any, tuple[int, ...]]) -> tuple[str, Turn, tuple[int, ...]]:
        name, chat, shown = item
        what = f"record '{name}' in {recipe.name}/{split}"
        turn = from_messages(chat, what)
        check_markers(turn, len(shown), what)
        return name, turn, shown

    found = sift(record, zip(ids, chats, pictures.shown, strict=True), problems)
    classify = recipe.kind == "classification"
    return Records(
        ids=[name for name, _, _ in found],
        pictures=Pictures(pictures.dataset, pictures.cells, [shown for _, _, shown in found]),
        labels=[turn.answers[0] if classify else None for _, turn, _ in found],
        label_names=None,
        questions=[None if classify else turn.question for _, turn, _ in found],
        answers=[[] if classify else turn.answers for _, turn, _ in found],
    )


def _pictures(
    recipe: Recipe, split: str, table: datasets.Dataset, column: str | None, folder: Path | None, roots: tuple[Path, ...]
) -> Pictures:
    """The pictures of a column of images, of lists of images, or of paths in the task's folder; unread.

    An empty cell is a record without a picture, but in classification, which cannot do without, a broken one.
    """
    if column is None:
        return picture_files([[] for _ in range(len(table))])
    feature, what = table.features[column], f"column '{column}' in the {split} split of '{recipe.name}'"
    lists = isinstance(feature, datasets.List | datasets.LargeList)
    if folder is not None and (feature.feature if lists else feature) in (TEXT, LARGE_TEXT):
        cells = [c if lists else [c] for c in table[column]]
        return picture_files([[inside(folder, c, what, roots[0]) for c in own or [] if c is not None] for own in cells])
    undecoded = datasets.Image(decode=False)
    try:
        images = table.select_columns([column]).cast_column(column, datasets.List(undecoded) if lists else undecoded)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(
            f"the column '{column}' in the {split} split of '{recipe.name}' holds no images ({told(error)})",
            "name the right one with 'source.columns.image' in the recipe",
        ) from error
    if column != "image":
        images = images.rename_column(column, "image")
    _refuse_paths(images, lists, what, roots)
    return _located(images, lists, keep_empty=recipe.kind == "classification")


def _refuse_paths(images: datasets.Dataset, lists: bool, what: str, roots: tuple[Path, ...]) -> None:
    """A cell without bytes names a file, which may not lie just anywhere."""
    cells = images.with_format("arrow")[:]["image"]
    cells = pyarrow.compute.list_flatten(cells) if lists else cells
    bare = pyarrow.compute.is_null(pyarrow.compute.struct_field(cells, "bytes"))
    for path in pyarrow.compute.filter(pyarrow.compute.struct_field(cells, "path"), bare).drop_null().to_pylist():
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
