"""The configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora.errors import ConfigError, nearest

SHIPPED = Path(__file__).parent.parent / "configs"


def find_config(name_or_path: str) -> Path:
    """The path of a configuration given by file or by shipped name."""
    for path in (Path(name_or_path), SHIPPED / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no configuration '{name_or_path}', neither as a file nor among the shipped ones",
        nearest(name_or_path, [*list_configs(), *list_tables()]),
    )


def list_configs() -> list[str]:
    """Names of the shipped configurations of one run."""
    return sorted({path.stem for path in SHIPPED.glob("*.yaml")} - set(list_tables()))


def list_tables() -> list[str]:
    """Names of the shipped tables of many runs."""
    return sorted(path.stem for path in SHIPPED.glob("table-*.yaml"))
