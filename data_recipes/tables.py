"""Tables: parquet files and datasets on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from .errors import RecipeError, nearest
from .places import inside, own_path, set_folder, told
from .records import Records, one_each

if TYPE_CHECKING:
    from .recipe import Recipe


def read_parquet(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """Parquet files; a split is one pattern or several, its files read in the order of their names.

    Raises:
        RecipeError: a file or a column is missing, or a file is not parquet.
    """
    folder = set_folder(recipe, data_root)
    patterns = recipe.splits[split]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in patterns:
        inside(folder, pattern, f"split '{split}' of recipe '{recipe.name}'")
        found = sorted(folder.glob(pattern))
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
    return _from_table(recipe, split, table)


def read_hub(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
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
    return _from_table(recipe, split, table)


def _from_table(recipe: Recipe, split: str, table: datasets.Dataset) -> Records:
    """Records from a table's columns, by the names in `source.columns`."""
    names = recipe.source.get("columns", {})
    classify = recipe.kind == "classification"
    needed = ["image", "label"] if classify else ["image", "answers"] + ["question"] * (recipe.kind == "vqa")
    for role in sorted({*needed, *names}):
        column = names.get(role, role)
        if column not in table.column_names:
            raise RecipeError(
                f"the {split} split of '{recipe.name}' has no column '{column}'",
                f"{nearest(column, table.column_names)}; set it with 'source.columns.{role}' in the recipe",
            )

    def values(role: str) -> list[Any] | None:
        name = names.get(role, role)
        return table[name][:] if name in table.column_names else None

    count = len(table)
    ids = values("id") or [f"{split}-{i}" for i in range(count)]
    image = names.get("image", "image")
    try:
        images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(
            f"the column '{image}' in the {split} split of '{recipe.name}' holds no images ({told(error)})",
            "name the right one with 'source.columns.image' in the recipe",
        ) from error
    if image != "image":
        images = images.rename_column(image, "image")
    feature = table.features[names.get("label", "label")] if classify else None
    answers = [] if classify else [a if isinstance(a, list) else [a] for a in values("answers")]
    return Records(
        ids=[str(i) for i in ids],
        images=images,
        pictures=one_each(count),
        labels=values("label") if classify else [None] * count,
        label_names=list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        questions=[None] * count if classify else values("question") or [None] * count,
        answers=[[]] * count if classify else answers,
    )


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
