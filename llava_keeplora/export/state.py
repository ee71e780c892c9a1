"""Export of the state that a run needs to continue elsewhere.

A state is a run folder of one method without predictions, initial adapters and plots, in safetensors and
JSON alone. `state.json` lists every file with its SHA-256; files that it doesn't list are not read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.config import REFERENCE_PLACES, ZERO_SHOT
from llava_keeplora.errors import RunError
from llava_keeplora.export.loaded_run import Base, LearnedRun, checked, find_local
from llava_keeplora.files import write_bytes, write_json
from llava_keeplora.journal import OUTCOMES, Entry, Journal
from llava_keeplora.models import embedded_models
from llava_keeplora.registries import without_places
from llava_keeplora.run_folder import (
    ADAPTERS,
    ADOPTED,
    BASE,
    CONFIG,
    IDENTITY,
    JOURNAL,
    MATRIX,
    OWN_ANSWERS,
    PREDICTIONS,
    Stage,
    kept_recipe,
    read_record,
)
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.models import EXPORT
from llava_keeplora_recipes import Recipe
from llava_keeplora_recipes.strict_yaml import is_file_name

FORMAT = 1
MANIFEST = "state.json"
#: Folder of the state in an exported adapter's.
FOLDER = "keeplora_state"
#: The file that describes an export, with the hashes of its files; a folder that has one may be replaced by a
#: later export.
RECORD = EXPORT
#: Suffixes of the files that a state may hold.
SUFFIXES = (".safetensors", ".json", ".jsonl", ".yaml")
#: Files that are left out, as none is read again once a task is closed: answers may be personal data, and
#: initial adapters, and adopted updates as they came, are as large as deltas.
LEFT_OUT = (PREDICTIONS, OWN_ANSWERS, ADAPTERS, ADOPTED)
#: Prefixes of training arguments that belong to one person or one machine: tokens, accounts, paths.
PRIVATE = (
    "accelerator_config",
    "deepspeed",
    "fsdp",
    "hub_",
    "logging_dir",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "trackio",
)


def write_state(learned: LearnedRun, base: Base, folder: Path) -> None:
    """Write the state of one method after some of its tasks, laid out as a run folder.

    Args:
        learned: the run up to the exported task.
        base: the base's id and revision.
        folder: the folder to write to.

    Raises:
        RunError: a file of the run is missing or changed.
    """
    if len(learned.places) < len(learned.config["tasks"]):
        raise RunError(
            f"{learned.run} has rolled tasks of '{learned.label}' back, which a state would hold",
            "fork the run, which leaves them out, and export the fork's state",
        )
    for label in (ZERO_SHOT, learned.label):
        entries = (
            learned.entries if label == learned.label else Journal(learned.run / ZERO_SHOT / JOURNAL).entries
        )
        # A run that goes on from a state has no guard, unless its configuration sets one.
        entries = [entry for entry in entries if entry.stage not in (Stage.GUARDED, *OUTCOMES)]
        _copy_history(learned.run / label, entries, folder / label)
    learned.matrix.to_json(folder / learned.label / MATRIX)
    shutil.copyfile(learned.run / ZERO_SHOT / MATRIX, folder / ZERO_SHOT / MATRIX)
    for name in (IDENTITY, CONFIG):
        tree = read_record(learned.run / name)
        write_bytes(folder / name, (json.dumps(_portable(tree, learned, base), indent=2) + "\n").encode())
    for task, recipe in zip(learned.config["tasks"], learned.recipes, strict=True):
        if is_file_name(task):
            write_bytes(
                kept_recipe(folder, recipe.name),
                (json.dumps(_recipe_facts(recipe), indent=1) + "\n").encode(),
            )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    facts = {"label": learned.label, "tasks": len(learned.deltas), "base": base.id, "revision": base.revision}
    write_json(folder / MANIFEST, {"format": FORMAT, **facts, "files": hashes})


def _copy_history(source: Path, entries: Sequence[Entry], folder: Path) -> None:
    """Copy a journal, and those of its files that are needed to continue."""
    written = ((name, entry) for entry in entries for name in entry.files)
    # A stage that ran again, because the run was extended, wrote its files again: the last entry counts.
    latest = {name: entry for name, entry in written if not set(PurePosixPath(name).parts) & set(LEFT_OUT)}
    for name, entry in latest.items():
        path = checked(source / name, entry.files[name], f"task {entry.task}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    journal = Journal(folder / JOURNAL)
    for entry in entries:
        journal.append(
            replace(entry, files={name: value for name, value in entry.files.items() if name in latest})
        )


def _portable(tree: dict[str, Any], learned: LearnedRun, base: Base) -> dict[str, Any]:
    """Return a resolved configuration, or an identity, with one method and nothing of this machine."""
    tree = json.loads(json.dumps(tree))
    if learned.label not in tree.get("methods", ()):
        raise RunError(f"{learned.run / IDENTITY} knows no method '{learned.label}'", "restore it")
    tree["methods"] = {learned.label: tree["methods"][learned.label]}
    without_places(tree)
    tree.pop("guard", None)
    if "sequence" in tree:
        tree["sequence"] = None  # Its tasks are listed.
    names = {
        task: recipe.name
        for task, recipe in zip(learned.config["tasks"], learned.recipes, strict=True)
        if is_file_name(task)
    }
    tree["tasks"] = [
        kept_recipe(Path(), names[task]).as_posix() if task in names else task for task in tree["tasks"]
    ]
    if find_local(learned.model.name_or_path) and learned.model.name_or_path not in embedded_models():
        tree["model"]["name_or_path"] = base.id
    tree["model"].pop("object", None)
    if BASE in tree:
        tree[BASE] = learned.base_record()
    for section in (tree, *tree["methods"].values()):
        section["training"] = public(section["training"])
    tree["methods"][learned.label]["options"] = placeless(tree["methods"][learned.label]["options"])
    if "output_dir" in tree:
        tree["output_dir"], tree["data"]["root"] = "", None
        tree["adopted"] = [source and Path(source).name for source in tree.get("adopted", ())]
    return tree


def public(training: dict[str, Any]) -> dict[str, Any]:
    """Return training arguments without those that belong to one person or one machine (`PRIVATE`)."""
    return {key: value for key, value in training.items() if not key.startswith(PRIVATE)}


def placeless(options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's options with absolute paths cut to their last part."""
    return options | {
        key: Path(options[key]).name for key in REFERENCE_PLACES if Path(options.get(key) or "").is_absolute()
    }


def _recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a YAML file that describes this recipe, with `extends` resolved.

    Absolute paths are cut to their last part.
    """
    facts = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        default = (
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        )
        if field.compare and value != default:
            facts[field.name] = value
    facts |= {"metric": recipe.metric_name, "source": facts["source"] | {"format": recipe.format_name}}
    if facts["source"]["format"] == "rendered":
        facts.pop("classes", None)  # The code that renders the images defines them.
    elif "classes" in facts and facts["classes"] is None:
        facts["classes"] = "from-source"
    path = facts["source"].get("path")
    if path and facts["source"]["format"] != "hub" and not stays_inside(path):
        facts["source"] = facts["source"] | {"path": Path(path).name}
    return facts


def stays_inside(path: Any) -> bool:
    """Return whether a value is a relative path that does not leave its folder."""
    if not isinstance(path, str) or not path or "\\" in path or "\0" in path or path.startswith("~"):
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
