"""The images in the columns of a table: bytes, paths, structs of both, and lists of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.compute

from .errors import RecipeError
from .media import is_empty
from .paths import describe_error, inside, within
from .recipe import Recipe
from .records import SourceImages, image_files

TEXT, LARGE_TEXT = datasets.Value("string"), datasets.Value("large_string")
#: What a cell, or an item of a list in it, holds: bytes, or a path to them, or nothing.
Place = bool | str | None
BYTES = True

#: Row → what is wrong with its images, as a clause after the record's name.
Faults = dict[int, RecipeError]


def read_images(
    recipe: Recipe,
    split: str,
    table: datasets.Dataset,
    columns: dict[str, str],
    folder: Path | None,
    roots: tuple[Path, ...],
) -> tuple[SourceImages, Faults]:
    """Find the images that a table's records show, those of `image` or `images`, whichever holds some.

    Args:
        columns: the table's column for every role.
        folder: where paths in the table start; None for a table from the Hub.
        roots: folders that a path of an image may lead into.

    Returns:
        The images, unread; and what is wrong with a record's, which then shows none.

    Raises:
        RecipeError: a column holds no images.
    """
    keep_empty = recipe.kind == "classification" and "images" not in columns
    named = [columns[role] for role in ("image", "images") if role in columns]
    if not named:
        return image_files([[] for _ in range(len(table))]), {}
    where = f"in the {split} split of '{recipe.name}'"
    held = [_column_of_images(where, table, column, folder, roots, keep_empty) for column in named]
    return held[0] if len(held) == 1 else _whichever(*held)


def _whichever(
    first: tuple[SourceImages, Faults], second: tuple[SourceImages, Faults]
) -> tuple[SourceImages, Faults]:
    """Return each record's images from the one of two columns that shows some."""
    (one, one_faults), (other, other_faults) = first, second
    offset, lists, faults = len(one.cells), [_as_lists(one), _as_lists(other)], one_faults | other_faults
    cells = [(row, position or 0) for row, position in one.cells]
    cells += [(len(lists[0]) + row, position or 0) for row, position in other.cells]
    images = []
    for row, (mine, others) in enumerate(zip(one.shown, other.shown, strict=True)):
        if mine and others and [_cell(one, i) for i in mine] != [_cell(other, i) for i in others]:
            faults[row] = RecipeError(
                "has other images in 'image' than in 'images'", "keep those that are meant"
            )
        images.append(() if row in faults else mine or tuple(offset + i for i in others))
    return SourceImages(
        datasets.concatenate_datasets(lists), cells, images, one.folder or other.folder
    ), faults


def _cell(images: SourceImages, index: int) -> object:
    row, position = images.cells[index]
    cell = images.dataset[row]["image"]
    cell = cell if position is None else cell[position]
    return Path(images.folder, cell["path"]) if cell["bytes"] is None else cell["bytes"]


def _as_lists(images: SourceImages) -> datasets.Dataset:
    """Return images as lists of images, without a copy of them."""
    features = datasets.Features({"image": datasets.List(datasets.Image(decode=False))})
    dataset = images.dataset
    if isinstance(dataset.features["image"], datasets.List | datasets.LargeList):
        return dataset.cast(features)
    chunks = arrow_column(dataset, "image").chunks
    ends = [pyarrow.array(range(len(chunk) + 1), pyarrow.int32()) for chunk in chunks]
    lists = [pyarrow.ListArray.from_arrays(*parts) for parts in zip(ends, chunks, strict=True)]
    table = pyarrow.table({"image": pyarrow.chunked_array(lists, features.arrow_schema.field("image").type)})
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _column_of_images(
    where: str,
    table: datasets.Dataset,
    column: str,
    folder: Path | None,
    roots: tuple[Path, ...],
    keep_empty: bool,
) -> tuple[SourceImages, Faults]:
    """Find the images of a column of images, of lists of images, or of paths in the task's folder.

    An empty cell is a record without an image, but in classification, which cannot do without, a broken one.
    """
    feature = table.features[column]
    lists = isinstance(feature, datasets.List | datasets.LargeList)
    paths_alone = folder is not None and (feature.feature if lists else feature) in (TEXT, LARGE_TEXT)
    if paths_alone:
        images, places = None, [_as_places(cell if lists else [cell]) for cell in table[column]]
    else:
        images = _as_images(f"column '{column}' {where}", table, column, lists)
        places = _places_of(images, lists)
    faults: Faults = {}
    for row, listed in enumerate(places):
        try:
            _check_places(listed, column, folder, roots)
        except RecipeError as error:
            faults[row] = error
            places[row] = []
    if images is None:
        return image_files([[folder / name for name in listed if name] for listed in places]), faults
    return _located(images, lists, places, keep_empty, faults, folder), faults


def _as_images(what: str, table: datasets.Dataset, column: str, lists: bool) -> datasets.Dataset:
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
    return images if column == "image" else images.rename_column(column, "image")


def _places_of(images: datasets.Dataset, lists: bool) -> list[list[Place]]:
    """Return what the cells hold, by row, without reading an image."""
    arrow = arrow_column(images, "image")
    cells = pyarrow.compute.list_flatten(arrow) if lists else arrow
    has_bytes = pyarrow.compute.struct_field(cells, "bytes").is_valid().to_pylist()
    paths = _as_places(pyarrow.compute.struct_field(cells, "path").to_pylist())
    flat = [BYTES if held else path for held, path in zip(has_bytes, paths, strict=True)]
    if not lists:
        return [[place] for place in flat]
    places, start = [], 0
    for count in pyarrow.compute.list_value_length(arrow).to_pylist():
        places.append(flat[start : start + (count or 0)])
        start += count or 0
    return places


def _as_places(paths: Sequence[str | None] | None) -> list[Place]:
    return [None if is_empty(path) else path for path in paths or []]


def _check_places(places: list[Place], column: str, folder: Path | None, roots: tuple[Path, ...]) -> None:
    """Refuse paths that lead just anywhere, and empty items among others, which would shift their places."""
    if any(place is None for place in places) and any(places):
        raise RecipeError(
            f"has an empty place among the {len(places)} in '{column}'",
            "name its image, or remove the place",
        )
    for place in places:
        if not isinstance(place, str):
            continue
        if "://" in place and "::" in place:
            raise RecipeError(
                f"has its image in an archive ('{place}'), and images are read from files and tables",
                "unpack the archive, or use parquet files",
            )
        if folder is not None:
            inside(folder, place, f"(column '{column}')", roots[0])
        elif not Path(place).is_absolute():
            raise RecipeError(
                f"has the path {place!r} in '{column}' without the image, which does not come with it",
                "use a dataset that holds its images, or download it and give its folder as 'source.path'",
            )
        else:
            within(Path(place), f"(column '{column}')", *roots)


def _located(
    images: datasets.Dataset,
    lists: bool,
    places: list[list[Place]],
    keep_empty: bool,
    faults: Faults,
    folder: Path | None,
) -> SourceImages:
    cells: list[tuple[int, int | None]] = []
    images_of_rows = []
    for row, listed in enumerate(places):
        positions = [i for i, place in enumerate(listed) if place is not None or (keep_empty and not lists)]
        images_of_rows.append(tuple(range(len(cells), len(cells) + len(positions))))
        cells += [(row, i if lists else None) for i in positions]
    return SourceImages(images, cells, images_of_rows, str(folder.absolute()) if folder is not None else "")


def arrow_column(table: datasets.Dataset, column: str) -> pyarrow.ChunkedArray:
    """Return a column as Arrow has it, nothing decoded."""
    return table.select_columns([column]).with_format("arrow")[:][column]
