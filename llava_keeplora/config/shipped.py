"""The configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora.errors import ConfigError, nearest

SHIPPED = Path(__file__).parent.parent / "configs"


def find_config(name_or_path: str) -> Path:
    """Return the path of a configuration, given as a file or by the name of a shipped one.

    Raises:
        ConfigError: if there is neither.
    """
    for path in (Path(name_or_path), SHIPPED / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no configuration '{name_or_path}', neither as a file nor among the shipped ones",
        nearest(name_or_path, [*list_configs(), *list_tables()]),
    )


def list_configs() -> list[str]:
    """Return the names of the shipped configurations of single runs."""
    return sorted({path.stem for path in SHIPPED.glob("*.yaml")} - set(list_tables()))


def list_tables() -> list[str]:
    """Return the names of the shipped tables of several runs."""
    return sorted(path.stem for path in SHIPPED.glob("table-*.yaml"))
