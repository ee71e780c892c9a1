"""Reading the package's YAML files: unknown, repeated and misspelt keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError, nearest


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses them."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds something else.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror})", "give the path of an existing YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} is not valid YAML ({' '.join(str(error).split())})", "correct the file"
        ) from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} holds no 'key: value' pairs", "start from one of the shipped files")
    return value


def check_keys(facts: dict[str, Any], keys: dict[str, tuple[type, str]], path: Path) -> None:
    """Refuse a key that is not in `keys`, or a value of another type than the one given there.

    Raises:
        RecipeError: names the file, the key and the nearest valid one.
    """
    for key, value in facts.items():
        if key not in keys:
            raise RecipeError(f"{path.name} has the unknown key '{key}'", nearest(str(key), keys))
        kind, word = keys[key]
        # bool is an int in Python
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RecipeError(
                f"{path.name} has {value!r} under '{key}', which is not {word}",
                f"write {word} there, in {path}",
            )


def list_shipped(folder: Path) -> list[str]:
    """Names (path without ending, '/' between parts) of the YAML files under a folder, sorted."""
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def is_file_name(name_or_path: str | Path) -> bool:
    """Whether this is a user's file rather than a name that comes with the package."""
    return isinstance(name_or_path, Path) or str(name_or_path).endswith((".yaml", ".yml"))


def resolve(
    name_or_path: str | Path, folder: Path, word: str, start: Path | None = None
) -> tuple[Path, bool]:
    """Where a shipped name or a user's path points to, and whether it is a shipped one.

    Args:
        name_or_path: a name from `list_shipped(folder)`, or a path that ends in .yaml or .yml.
        folder: the package's folder.
        word: what is looked for, for the error's sentence.
        start: folder where relative paths start; the working directory if None.

    Raises:
        RecipeError: there is no such name or file.
    """
    if is_file_name(name_or_path):
        path = (start or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise RecipeError(f"there is no {word} file '{path}'", "give the path of an existing YAML file")
        return path, False
    shipped = list_shipped(folder)
    if name_or_path not in shipped:
        raise RecipeError(
            f"there is no {word} '{name_or_path}'",
            f"{nearest(str(name_or_path), shipped)}, or give the path of a .yaml file",
        )
    return folder / f"{name_or_path}.yaml", True
