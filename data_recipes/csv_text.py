"""CSV files of datasets in the Hub's layout, read as the text that is written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.builder import Key
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

from .errors import RecipeError
from .json_files import read_text

#: Folder of datasets' cache for tables whose CSV cells are text; others there hold what pandas made of them.
CACHE = "csv-as-text"


def load_hub_dataset(
    target: str, config: str | None, split: str, revision: str | None, label: str
) -> datasets.Dataset:
    """Load a split as `datasets.load_dataset` does, but with every CSV cell of a local folder as text.

    CSV files on the Hub are read by datasets, whose cache serves them without a network too.
    pandas, which datasets reads CSV with, makes `7` of `007`, true of `True` and null of `NA`, `None` and
    `nan` (github.com/huggingface/datasets/issues/4467). Labels that are all whole numbers in their shortest
    form are whole numbers, as the positions of classes are written.

    Args:
        target, config, split, revision: see `datasets.load_dataset`.
        label: the column of labels.

    Raises:
        RecipeError: see `read_csv`.
    """
    is_folder = Path(target).is_dir()
    if not is_folder or not _reads_csv(datasets.load_dataset_builder(target, config, revision=revision)):
        return datasets.load_dataset(target, config, split=split, revision=revision)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / CACHE
    builder = datasets.load_dataset_builder(target, config, revision=revision, cache_dir=str(cache))
    if isinstance(builder, Csv):
        separator = builder.config.sep

        def generate(
            base_files: Any, files_iterables: Iterable[Iterable[str]]
        ) -> Iterator[tuple[Key, pyarrow.Table]]:
            for shard, files in enumerate(files_iterables):
                for index, file in enumerate(files):
                    yield Key(shard, index), builder._cast_table(read_csv(Path(file), separator))

        builder._generate_tables = generate
    else:
        read_metadata = builder._read_metadata

        def read(metadata_file: str, metadata_ext: str = "") -> Iterator[pyarrow.Table]:
            if metadata_ext == ".csv":
                return iter([read_csv(Path(metadata_file), needed=("file_name", "file_names"))])
            return read_metadata(metadata_file, metadata_ext)

        builder._read_metadata = read
    builder.download_and_prepare()
    return _with_whole_labels(builder.as_dataset(split=split), label)


def _reads_csv(builder: datasets.DatasetBuilder) -> bool:
    """Return whether `read_csv` can take the place of datasets' own reading."""
    if isinstance(builder, Csv):
        settings = builder.config
        return settings.header == "infer" and not settings.names and not settings.skiprows
    files = [file for listed in (builder.config.data_files or {}).values() for file in listed]
    return isinstance(builder, FolderBasedBuilder) and any(
        str(file).endswith("metadata.csv") for file in files
    )


def _with_whole_labels(table: datasets.Dataset, label: str) -> datasets.Dataset:
    if table.features.get(label) != datasets.Value("string"):
        return table
    if not all(cell is not None and _is_whole_number(cell) for cell in table[label]):
        return table
    return table.cast_column(label, datasets.Value("int64"))


def read_csv(path: Path, separator: str = ",", needed: tuple[str, ...] = ()) -> pyarrow.Table:
    """Read a CSV file (RFC 4180) whose first row names the columns; every cell is text.

    Args:
        path: the file; UTF-8, UTF-16 or UTF-32.
        separator: the character between cells.
        needed: columns of which a row has to fill one, where the file has them.

    Raises:
        RecipeError: the file is no CSV, has no rows, a repeated column, a row of another length than the
            header, or one without a needed cell.
    """
    text = read_text(path)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except (TypeError, csv.Error) as error:
        raise RecipeError(f"{path} cannot be read as CSV ({error})", "correct the file") from error
    header, *rows = [line for line in lines if line] or [[]]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise RecipeError(f"{path} has the column '{twice[0]}' more than once", "keep one of them")
    if not rows:
        raise RecipeError(f"{path} has no rows", "add a row for each example, or remove the file")
    required = [header.index(name) for name in needed if name in header]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise RecipeError(
                f"row {number} of {path} has {len(row)} cells and the header has {len(header)}",
                "put quotes around cells that hold commas",
            )
        if required and not any(row[column].strip() for column in required):
            raise RecipeError(
                f"row {number} of {path} has an empty '{header[required[0]]}'",
                "name a file, or remove the row",
            )
    columns: dict[str, list[str]] = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return pyarrow.table(columns)


def _is_whole_number(cell: str) -> bool:
    return cell.isascii() and cell.isdigit() and len(cell) < 10 and str(int(cell)) == cell
