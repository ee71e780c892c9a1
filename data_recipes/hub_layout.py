"""Loading of datasets on the Hub and local folders in its layout, with cells of text files as written."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.compute
from datasets.builder import Key
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from .csv_text import read_csv
from .errors import RecipeError
from .file_bytes import read_file
from .image_folder import files_under
from .json_tables import as_written, read_json_table
from .metadata_files import METADATA, read_metadata
from .parquet_files import BATCH_SIZE, WITHOUT_ROWS, count_rows, refuse_mixed_booleans
from .strict_json import decode_text

#: Form of text files → folder of datasets' cache for tables that are read here, apart from pandas' ones.
CACHES = {"csv": "csv-as-written", "json": "json-as-written"}
#: Names of columns of metadata that name files.
FILE_NAME = re.compile(r"(.*_)?file_name")
#: Settings for CSV files that a dataset's card may have; others would change the content of cells.
CSV_SETTINGS = ("sep", "delimiter", "names", "column_names", "header", "encoding", "features", "chunksize")

Generate = Callable[..., Iterator[tuple[Key, pyarrow.Table]]]


@dataclass(frozen=True)
class HubTable:
    """A split of a dataset in the Hub's layout.

    Attributes:
        table: its rows.
        left_out: files of the split that no row uses, by kind; see `Records.left_out`.
        names_files: whether every row names an image's file, as in metadata.csv.
    """

    table: datasets.Dataset
    left_out: dict[str, list[str]] = field(default_factory=dict)
    names_files: bool = False


def load_hub_dataset(
    target: str, config: str | None, split: str, revision: str | None, label: str
) -> HubTable:
    """Load a split as `datasets.load_dataset` does, but with the cells of text files as they are written.

    pandas, which datasets reads CSV with, makes `7` of `007`, true of `True` and null of `NA`, `None` and
    `nan` (github.com/huggingface/datasets/issues/4467); of JSON, datasets makes dates of text that looks like
    one, and `"red"` with its quotes of `red` where another record has a number. CSV labels that are all whole
    numbers in their shortest form are whole numbers, as the positions of classes are written.

    Args:
        target, config, split, revision: see `datasets.load_dataset`.
        label: the column of labels.

    Raises:
        RecipeError: see `read_csv` and `read_json_table`; or, without a network, the cache holds what pandas
            made of a CSV file alone.
    """
    builder, form = _builder(target, config, revision)
    if isinstance(builder, Parquet):
        builder.config.batch_size = builder.config.batch_size or BATCH_SIZE
        for files in builder.config.data_files.values():
            refuse_mixed_booleans([Path(file) for file in files if os.path.isabs(str(file))])
    builder.download_and_prepare()
    try:
        table = builder.as_dataset(split=split)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise RecipeError(f"the split '{split}' of '{target}' has no rows", "add examples") from error
    names_files = builder.info.builder_name == "imagefolder"
    left_out = _left_out(builder, split, target)
    return HubTable(_with_whole_labels(table, label) if form == "csv" else table, left_out, names_files)


def _builder(
    target: str, config: str | None, revision: str | None
) -> tuple[datasets.DatasetBuilder, str | None]:
    """Return the builder of a dataset, and the form of its text files (None if datasets reads them)."""

    def load(form: str | None) -> datasets.DatasetBuilder:
        cache = Path(datasets.config.HF_DATASETS_CACHE, *[CACHES[form]] if form else [])
        return datasets.load_dataset_builder(target, config, revision=revision, cache_dir=str(cache))

    try:
        builder = load(None)
    except Exception:
        if cached := _first_cached(target, load):
            return cached
        raise
    if form := _form(builder):
        return _reading_text(load(form)), form
    if not builder.config.data_files and not Path(target).is_dir():  # of the cache, without a network
        if cached := _first_cached(target, load):
            return cached
        _refuse_pandas(builder, target)
    return builder, None


def _first_cached(
    target: str, load: Callable[[str], datasets.DatasetBuilder]
) -> tuple[datasets.DatasetBuilder, str] | None:
    """Return a builder and form that are in the cache and need no network; None if there are none."""
    for form in CACHES if not Path(target).is_dir() else ():
        with suppress(Exception):  # whatever the Hub's client raises where it has neither network nor cache
            return load(form), form
    return None


def _form(builder: datasets.DatasetBuilder) -> str | None:
    """Return the form of a dataset's text files: a key of `CACHES`, or None."""
    if isinstance(builder, Csv):
        return "csv"
    if isinstance(builder, Json):
        return "json"
    if isinstance(builder, FolderBasedBuilder):
        names = {os.path.basename(file) for files in builder.config.data_files.values() for file in files}
        return "csv" if METADATA[0] in names else "json" if names & {*METADATA} else None
    return None


def _refuse_pandas(builder: datasets.DatasetBuilder, target: str) -> None:
    """Refuse a cached dataset whose CSV cells pandas has read."""
    files = [str(name) for name in builder.info.download_checksums or {}]
    if builder.info.builder_name == "csv" or any(name.endswith("metadata.csv") for name in files):
        raise RecipeError(
            f"the cache holds '{target}' only as pandas reads CSV, which makes 7 of 007 and null of NA",
            "load it once with a network",
        )


def _reading_text(builder: datasets.DatasetBuilder) -> datasets.DatasetBuilder:
    """Make a builder read CSV and JSON files by `read_csv` and `read_json_table`, and return it."""
    if isinstance(builder, Csv):
        builder._generate_tables = _tables(builder, _csv_reader(builder))
    elif isinstance(builder, Json):
        settings = builder.config

        def read(file: str) -> pyarrow.Table:
            text, by_lines = _text(file, settings.encoding), ".jsonl" in os.path.basename(file.split("::")[0])
            table = read_json_table(text, file, by_lines, settings.field)
            return as_written(table, builder.info.features, file)

        builder._generate_tables = _tables(builder, read)
    elif isinstance(builder, FolderBasedBuilder):
        builder._read_metadata = _metadata_reader(builder._read_metadata)
        builder._generate_examples = _in_order(builder._generate_examples)
    return builder


def _tables(builder: Any, read: Callable[[str], pyarrow.Table]) -> Generate:
    def generate(files_iterables: Iterable[Iterable[str]], **_: Any) -> Iterator[tuple[Key, pyarrow.Table]]:
        for shard, files in enumerate(files_iterables):
            for index, file in enumerate(files):
                yield Key(shard, index), builder._cast_table(read(str(file)))

    return generate


def _csv_reader(builder: Csv) -> Callable[[str], pyarrow.Table]:
    settings = builder.config
    shared = {f.name for f in fields(datasets.BuilderConfig)} | set(CSV_SETTINGS)
    for setting in fields(settings):
        default = None if setting.default is MISSING else setting.default
        if setting.name not in shared and getattr(settings, setting.name) != default:
            raise RecipeError(
                f"the card of the dataset sets '{setting.name}' for its CSV files, read as they are",
                "write plain CSV or parquet files",
            )
    names = list(settings.names) if settings.names else None
    has_header = settings.header == 0 or (settings.header == "infer" and names is None)
    if not has_header and names is None:
        raise RecipeError(
            f"the dataset's card sets 'header: {settings.header}' for its CSV files and names no columns",
            "list the columns under 'names' there",
        )

    def read(file: str) -> pyarrow.Table:
        return read_csv(_text(file, settings.encoding), file, settings.sep, names, has_header)

    return read


def _metadata_reader(read_otherwise: Callable[..., Iterator[pyarrow.Table]]) -> Callable[..., Any]:
    first: dict[str, tuple[str, list[str]]] = {}

    def read(metadata_file: str, metadata_ext: str = "") -> Iterator[pyarrow.Table]:
        if metadata_ext not in (".csv", ".jsonl"):
            return read_otherwise(metadata_file, metadata_ext)
        table = read_metadata(_text(metadata_file), metadata_file)
        columns = sorted(table.column_names)
        other, expected = first.setdefault("first", (metadata_file, columns))
        if columns != expected:
            raise RecipeError(
                f"{metadata_file} has other columns than {other}", "write the same ones in both"
            )
        return iter([table])

    return read


def _in_order(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Read metadata files in the order of their names, which in datasets differs from run to run."""

    def sorted_files(files: Any, metadata_files: Iterable[Any], **settings: Any) -> Any:
        return generate(files, sorted(metadata_files, key=str), **settings)

    return sorted_files


def _text(file: str, encoding: str | None = None) -> str:
    """Return the text of a file, or of one in an archive (`gzip://train.csv::/data/train.csv.gz`)."""
    try:
        if "::" in file:
            with fsspec.open(file, "rb") as opened:
                data = opened.read()
        else:
            data = read_file(file)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error})", "correct the file") from error
    try:
        if encoding is None or encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig"):
            return decode_text(data)
        return data.decode(encoding)
    except (ValueError, LookupError) as error:
        raise RecipeError(f"{file} {error}", "save the file as UTF-8") from error


def _left_out(builder: datasets.DatasetBuilder, split: str, target: str) -> dict[str, list[str]]:
    """Find the files next to a split's images that none of its rows uses, by kind."""
    if not isinstance(builder, FolderBasedBuilder | Parquet):
        return {}
    left_out: dict[str, list[str]] = defaultdict(list)
    listed = {
        str(name): [_in_repository(str(file), target) for file in files]
        for name, files in builder.config.data_files.items()
    }
    for name, files in listed.items():
        if not re.search(rf"(^|\+)\s*{re.escape(name)}\s*(\[|\+|$)", split):
            continue
        if isinstance(builder, Parquet):
            empty = [file for file in files if count_rows(Path(target, file)) == 0]
            left_out |= {WITHOUT_ROWS: empty} if empty else {}
            continue
        used = {_in_repository(path, target) for path in _shown_files(builder.as_dataset(split=name))}
        for file in files:
            if file not in used and os.path.basename(file) not in METADATA and not file.endswith(".zip"):
                left_out["not in the metadata"].append(file)
        for kind, others in _unread(target, files, set().union(*listed.values())).items():
            left_out[kind] += others
    return dict(left_out)


def _unread(target: str, files: list[str], read: set[str]) -> dict[str, list[str]]:
    """Find the files in a split's folders that datasets ignores, by kind."""
    left_out: dict[str, list[str]] = defaultdict(list)
    for top in sorted({file.partition("/")[0] for file in files if "/" in file}):
        folder = Path(target, top)
        if folder.is_dir():
            paths, hidden = files_under(folder, Path(target))
            for kind, names in hidden.items():
                left_out[kind] += names
            for path in paths:
                if (name := path.relative_to(target).as_posix()) not in read:
                    left_out[path.suffix.lower() or "without an ending"].append(name)
    return left_out


def _shown_files(table: datasets.Dataset) -> Iterator[str]:
    """Yield the paths of a table's images, without reading one."""
    for name, feature in table.features.items():
        lists = isinstance(feature, datasets.List | datasets.LargeList)
        if isinstance(feature.feature if lists else feature, datasets.Image):
            cells = table.select_columns([name]).with_format("arrow")[:][name]
            cells = pyarrow.compute.list_flatten(cells) if lists else cells
            yield from filter(None, pyarrow.compute.struct_field(cells, "path").to_pylist())


def _in_repository(path: str, target: str) -> str:
    """Return a file's path in its dataset: a folder, a revision on the Hub, or that in the Hub's cache."""
    if os.path.isabs(path) and Path(target).is_dir():
        return os.path.relpath(path, os.path.abspath(target))
    return re.sub(r"^(hf://datasets/[^/]+/[^/]+@[^/]+|.*/snapshots/[^/]+)/", "", path)


def _with_whole_labels(table: datasets.Dataset, label: str) -> datasets.Dataset:
    if table.features.get(label) != datasets.Value("string"):
        return table
    if not all(cell is not None and _is_whole_number(cell) for cell in table[label]):
        return table
    return table.cast_column(label, datasets.Value("int64"))


def _is_whole_number(cell: str) -> bool:
    return cell.isascii() and cell.isdigit() and len(cell) < 10 and str(int(cell)) == cell
