"""One run's folder: its lock, its configuration, and where things lie."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_keeplora.config import RunConfig, dump_config
from llava_keeplora.errors import RunError
from llava_keeplora.files import write_bytes, write_json
from llava_keeplora_eval.files import sweep


class Workspace:
    """A run folder.

    Args:
        config: the run; `output_dir` is the folder.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.root = Path(config.output_dir)

    def label(self, label: str) -> Path:
        """The folder of one method of the run."""
        return self.root / label

    def task(self, label: str, index: int, name: str) -> Path:
        """The folder of one task of one method."""
        return self.label(label) / f"task-{index:02d}-{name.replace('/', '-')}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; a lock that a killed process held is free again.

        Raises:
            RunError: if another process holds it, or the folder cannot be written.
        """
        if self.root.is_dir():
            self._refuse_foreign()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / ".lock", "a+")
        except OSError as error:
            raise RunError(f"the run folder {self.root} cannot be written ({error.strerror})", "choose another output_dir") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise RunError(
                    f"another run (process {file.read().strip() or 'unknown'}) is working in {self.root}",
                    "wait for it, stop it, or choose another output_dir",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            sweep(self.root)
            yield

    def claim(self) -> None:
        """Write the configuration into a new folder, or check that the folder's is the same.

        Raises:
            RunError: with the difference, if the folder belongs to another configuration, or holds other files.
        """
        identity = self.config.identity()
        if not (self.root / "config.json").exists():
            self._refuse_foreign()
            # The configuration's own file comes last: where it is, the folder is claimed.
            write_json(self.root / "identity.json", identity)
            write_bytes(self.root / "config.json", dump_config(self.config).encode())
            return
        try:
            known = json.loads((self.root / "identity.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.root / 'identity.json'} cannot be read ({error})", "restore it or start over in a new output_dir") from error
        changes = [f"{key}: {old!r} → {new!r}" for key, old, new in _told_once(differences(known, identity))]
        if changes:
            raise RunError(
                f"{self.root} holds a run with another configuration ({'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''})",
                "restore these values to go on, or choose another output_dir",
            )

    def _refuse_foreign(self) -> None:
        names = sorted(p.name for p in self.root.iterdir())
        others = [name for name in names if not name.startswith(".") and name != "identity.json"]
        if others and "config.json" not in names:
            raise RunError(f"{self.root} is not a run folder but holds {', '.join(others[:3])}", "choose an empty or new output_dir")


def _told_once(changes: Iterable[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Every method inherits the run's parts and training; what changed for all is told at the top alone."""
    changes = list(changes)
    general = {(key, str(old), str(new)) for key, old, new in changes}
    return [
        (key, old, new) for key, old, new in changes if not (key.startswith("methods.") and (key.split(".", 2)[-1], str(old), str(new)) in general)
    ]


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two trees of plain data differ: (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            yield from differences(before, after, f"{where}[{index}]")
    elif old != new:
        yield where, old, new
