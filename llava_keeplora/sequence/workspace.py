"""The folder of one run: its lock, its configuration, and the paths in it."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_keeplora.config import ZERO_SHOT, RunConfig
from llava_keeplora.errors import RunError
from llava_keeplora.files import write_bytes, write_json
from llava_keeplora.journal import Journal
from llava_keeplora.run_folder import (
    BASE,
    CONFIG,
    IDENTITY,
    JOURNAL,
    LOCK,
    RUN_FILES,
    VERSIONS,
    differences,
    dump_config,
    kept_recipe,
    read_dumped,
    task_folder,
)
from llava_keeplora.saved_run import (
    base_changes,
    base_content,
    base_record,
    check_base,
    read_identity,
    recorded_base,
    run_identity,
)
from llava_keeplora.versions import version_changes, worker_changes, write_versions
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import sweep
from llava_keeplora_recipes import load_recipe
from llava_keeplora_recipes.recipe_files import flat_recipe
from llava_keeplora_recipes.strict_yaml import is_file_name

logger = logging.getLogger(__name__)

#: Sections of a configuration on which the zero-shot row does not depend.
OF_METHODS = ("methods", "parts", "training")
#: Keys that say where the base model is; a model with the same content may be read from anywhere.
MODEL_PLACE = ("model.name_or_path", "model.revision")


class Workspace:
    """A run folder.

    Args:
        config: the run's configuration; `output_dir` is the folder.
        root: a temporary folder that becomes `output_dir` when it is complete; `output_dir` itself when None.
        content: returns the content of a base model that the calling program holds; read from its files when
            None.
    """

    def __init__(
        self,
        config: RunConfig,
        root: Path | None = None,
        content: Callable[[], dict[str, Any]] | None = None,
    ):
        self.config, self._content = config, content
        self.root = Path(config.output_dir) if root is None else root

    @cached_property
    def base(self) -> dict[str, Any]:
        """The base model's content, computed once per start; see `base_content`."""
        return self._content() if self._content else base_content(self.config.model)

    def label(self, label: str) -> Path:
        """Return the folder of one method of the run."""
        return self.root / label

    def task(self, label: str, index: int, name: str) -> Path:
        """Return the folder of one task of one method."""
        return self.label(label) / task_folder(index, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; the system releases the lock of a killed process.

        Raises:
            RunError: if another process has locked it, or the folder cannot be written.
        """
        if self.root.is_dir():
            self._refuse_foreign()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / LOCK, "a+")  # noqa: SIM115  held until the run ends
        except OSError as error:
            raise RunError(
                f"the run folder {self.root} cannot be written ({error.strerror})",
                "choose another output_dir",
            ) from error
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

    def check(self) -> None:
        """Refuse a folder that belongs to another configuration; tasks may have been appended to it.

        Raises:
            RunError: if the folder belongs to another configuration or base model (names the difference),
                holds files of something else, or the base model is no longer where it was.
        """
        if not (self.root / CONFIG).exists():
            return self._refuse_foreign()
        changes = [_describe_change(*change) for change in _without_inherited(self._changes())]
        if changes and not self.begun_anew():
            raise RunError(
                f"{self.root} holds a run with another configuration "
                f"({'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''})",
                "restore these values to go on, or choose another output_dir",
            )
        if self._has_work():
            try:
                check_base(self.root, self.config.model, self.base)
            except EvalError as error:
                raise RunError(
                    error.problem,
                    f"{error.cure}; where its base lies elsewhere now, add model.name_or_path=DIR to the "
                    "command",
                ) from error

    def _has_work(self) -> bool:
        """Return whether a stage of the folder's run has finished."""
        labels = [ZERO_SHOT, *read_dumped(self.root).get("methods", {})]
        return any(Journal(self.label(label) / JOURNAL).has_work for label in labels)

    def _changes(self) -> list[tuple[str, Any, Any]]:
        """Return (dotted key, old, new) where configuration and folder differ, but for appended tasks."""
        recorded = read_identity(self.root)
        config = (
            self.config.first(len(recorded["tasks"]))
            if len(self.config.tasks) > len(recorded["tasks"])
            else self.config
        )
        changes = list(differences(recorded, run_identity(config)))
        if (
            any(key in MODEL_PLACE for key, _, _ in changes)
            and base_changes(self.root, self.config.model, self.base) == []
        ):
            changes = [change for change in changes if change[0] not in MODEL_PLACE]
        return changes

    def begun_anew(self) -> list[str]:
        """Return the labels of methods whose folders start over, because the configuration has changed.

        Empty once a stage of a method has finished. Until then the folder accepts another configuration: some
        errors of a configuration appear only in a stage, and the corrected one must be able to start. The
        zero-shot row is kept if nothing that it depends on has changed.
        """
        if not (self.root / CONFIG).exists() or not (changes := self._changes()):
            return []
        labels = [ZERO_SHOT, *read_dumped(self.root).get("methods", {})]
        with_work = [label for label in labels if Journal(self.label(label) / JOURNAL).has_work]
        affects_all = any(key.partition(".")[0] not in OF_METHODS for key, _, _ in changes)
        if with_work and (affects_all or with_work != [ZERO_SHOT]):
            return []
        return [label for label in labels if label not in with_work]

    def claim(self, base: dict[str, Any] | None = None) -> None:
        """Write the configuration into a folder that `check` has accepted, unless it is there already.

        Args:
            base: `{"base": record}` with the base model's record, if it is taken over from another run;
                computed from the model's files when None.
        """
        claimed, anew = (self.root / CONFIG).exists(), self.begun_anew()
        if anew:
            logger.warning(
                "%s starts over: it had another configuration, and no stage of a method had finished",
                self.root,
            )
            for label in anew:
                shutil.rmtree(self.label(label), ignore_errors=True)
        changes = version_changes(self.root)
        if changes:
            logger.warning(
                "%s was begun with other versions of libraries (%s); from here on its numbers may differ in "
                "their last digits",
                self.root,
                ", ".join(changes),
            )
        if workers := worker_changes(self.root):
            logger.warning(
                "%s was begun with other numbers of workers (%s); from here on sums are taken in another "
                "order and may differ in their last digits",
                self.root,
                ", ".join(workers),
            )
        recorded = recorded_base(self.root) if claimed and not anew and self._has_work() else None
        if recorded and len(read_dumped(self.root).get("tasks", ())) == len(self.config.tasks):
            return
        if not claimed and not (self.root / VERSIONS).exists():
            write_versions(self.root)
        self.write(base or {BASE: recorded or base_record(self.config.model, self.base)}, bool(anew))

    def write(self, base: dict[str, Any] | None = None, anew: bool = False) -> None:
        """Write the configuration, the identity and the users' recipes.

        Args:
            base: see `claim`; as it is recorded when None.
            anew: whether recipes that are there belong to a run that starts over.
        """
        identity, tasks = run_identity(self.config), []
        base = base or {BASE: recorded_base(self.root)}
        for task, name in zip(self.config.tasks, identity["tasks"], strict=True):
            recipe = kept_recipe(self.root, name)
            if is_file_name(task) and (anew or not recipe.exists()):
                write_bytes(recipe, flat_recipe(task).encode())
            # The recipe of a given dataset has no other place that lasts.
            lasting = load_recipe(task).source["format"] != "dataset"
            tasks.append(task if lasting else str(kept_recipe(Path(self.config.output_dir), name)))
        for entry in self.config.guard.watch if self.config.guard else ():
            recipe = kept_recipe(self.root, load_recipe(entry.task).name)
            if is_file_name(entry.task) and (anew or not recipe.exists()):
                write_bytes(recipe, flat_recipe(entry.task).encode())
        # config.json comes last: its presence means that the folder is claimed.
        write_json(self.root / IDENTITY, identity | base)
        recorded_config = dataclasses.replace(self.config, tasks=tuple(tasks))
        write_bytes(self.root / CONFIG, dump_config(recorded_config).encode())

    def _refuse_foreign(self) -> None:
        names = sorted(p.name for p in self.root.iterdir())
        # A killed start may have left files that are written before config.json.
        others = [name for name in names if not name.startswith(".") and name not in RUN_FILES]
        if others and CONFIG not in names:
            raise RunError(
                f"{self.root} is not a run folder but holds {', '.join(others[:3])}",
                "choose an empty or new output_dir",
            )


def _describe_change(key: str, old: Any, new: Any) -> str:
    """Describe a change of configuration; for a plug-in's source, name the file and leave its hashes out."""
    plugin, is_source, file = key.partition(".source.")
    if is_source:
        how = "was added" if old is None else "is missing" if new is None else "has changed"
        return f"the file {file} of the plug-in at {plugin} {how}"
    return f"{key}: {old!r} → {new!r}"


def _without_inherited(changes: Iterable[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Remove changes that every method inherits from the run's parts and training; the general one stays."""
    changes = list(changes)
    general = {(key, str(old), str(new)) for key, old, new in changes}
    return [
        (key, old, new)
        for key, old, new in changes
        if not (key.startswith("methods.") and (key.split(".", 2)[-1], str(old), str(new)) in general)
    ]
