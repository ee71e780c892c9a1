"""What a run needs to go on elsewhere: a run folder of one method without answers, starts and pictures; safetensors and JSON only.

`state.json` lists every file with its SHA-256, and nothing that it doesn't list is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.config import ZERO_SHOT, parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export.bundle import Base, Learned, checked, find_local
from llava_keeplora.export.hub import download
from llava_keeplora.files import file_hash, write_bytes, write_json
from llava_keeplora.journal import Entry, Journal
from llava_keeplora.models import embedded_models
from llava_keeplora_recipes import Recipe

FORMAT = 1
MANIFEST = "state.json"
#: Where an exported adapter keeps it.
FOLDER = "keeplora_state"
SUFFIXES = (".safetensors", ".json", ".jsonl", ".yaml")
#: Neither is read again once a task is closed; answers are personal data at times, and starts are as large as deltas.
LEFT_OUT = ("predictions", "adapters.safetensors")


def write_state(learned: Learned, base: Base, folder: Path) -> None:
    """Write the state of one method after some of its tasks, laid out as a run folder.

    Args:
        learned: the tasks.
        base: as others load it.
        folder: where to.

    Raises:
        RunError: if a file of the run is missing or changed.
    """
    for label in (ZERO_SHOT, learned.label):
        entries = learned.entries if label == learned.label else Journal(learned.run / ZERO_SHOT / "journal.jsonl").entries
        _copy_history(learned.run / label, entries, folder / label)
    learned.matrix.to_json(folder / learned.label / "matrix.json")
    shutil.copyfile(learned.run / ZERO_SHOT / "matrix.json", folder / ZERO_SHOT / "matrix.json")
    for name in ("identity.json", "config.json"):
        tree = json.loads((learned.run / name).read_text())
        write_bytes(folder / name, (json.dumps(_portable(tree, learned, base), indent=2) + "\n").encode())
    for task, recipe in zip(learned.config["tasks"], learned.recipes, strict=True):
        if _is_file(task):
            write_bytes(folder / _kept(recipe.name), (json.dumps(_recipe_facts(recipe), indent=1) + "\n").encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    write_json(folder / MANIFEST, {"format": FORMAT, "label": learned.label, "tasks": len(learned.deltas), "base": base.id, "revision": base.revision, "files": hashes})


def _copy_history(source: Path, entries: list[Entry], folder: Path) -> None:
    """A journal's entries with the files that are needed to go on."""
    latest = {name: (entry, value) for entry in entries for name, value in entry.files.items() if not set(PurePosixPath(name).parts) & set(LEFT_OUT)}
    for name, (entry, value) in latest.items():
        path = checked(source / name, value, f"task {entry.task}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    journal = Journal(folder / "journal.jsonl")
    for entry in entries:
        journal.append(replace(entry, files={name: value for name, value in entry.files.items() if name in latest}))


def _portable(tree: dict[str, Any], learned: Learned, base: Base) -> dict[str, Any]:
    """A resolved configuration, or its identity, without what is of one machine, and with one method."""
    tree = json.loads(json.dumps(tree))
    tree["methods"] = {learned.label: tree["methods"][learned.label]}
    if "sequence" in tree:
        tree["sequence"] = None  # Its tasks are listed.
    names = {task: recipe.name for task, recipe in zip(learned.config["tasks"], learned.recipes, strict=True) if _is_file(task)}
    tree["tasks"] = [_kept(names[task]) if task in names else task for task in tree["tasks"]]
    if find_local(learned.model.name_or_path) and learned.model.name_or_path not in embedded_models():
        tree["model"]["name_or_path"] = base.id
    for section in (tree, *tree["methods"].values()):
        section["training"].pop("deepspeed", None)
    if "output_dir" in tree:
        tree["output_dir"], tree["data"]["root"] = "", None
    return tree


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _kept(name: str) -> str:
    """Where the recipe of a user's task lies in a state, and in a run made of one."""
    return f"recipes/{name.replace('/', '-')}.yaml"


def _recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """What a YAML must say to be this recipe, `extends` resolved; absolute paths are cut to their last part."""
    facts = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name != "folder" and value != default:
            facts[field.name] = value
    if facts["source"]["format"] == "rendered":
        facts.pop("classes", None)  # The code that draws them has its own.
    elif "classes" in facts and facts["classes"] is None:
        facts["classes"] = "from-source"
    path = facts["source"].get("path")
    if path and facts["source"]["format"] != "hub" and not _inside(path):
        facts["source"] = facts["source"] | {"path": Path(path).name}
    return facts


def _inside(path: Any) -> bool:
    """Whether this is a path that stays in the folder where it starts."""
    if not isinstance(path, str) or not path or "\\" in path or "\0" in path or path.startswith("~"):
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def import_state(
    source: str, into: str | Path, *, revision: str | None = None, base: str | None = None, data_root: str | None = None
) -> Path:
    """Make a run folder of a published adapter or an exported state, for `train` and `extend` to go on with.

    Args:
        source: a folder, or a Hub id.
        into: the run folder to make; new or empty.
        revision: on the Hub.
        base: a folder with the base, or another id of it; as the state says when None.
        data_root: the folder with the data sets.

    Returns:
        the run's configuration as a YAML file, in the folder.

    Raises:
        ConfigError: for a target that is in use, or a source that is neither a folder nor on the Hub.
        RunError: for a source without a state, or with one that is damaged or leads out of its folder.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"{into} is there already and not an empty folder", "choose another one with --into")
    with ExitStack() as held:
        if Path(source).is_dir():
            found = Path(source)
        else:
            found = download(source, revision, Path(held.enter_context(tempfile.TemporaryDirectory())))
        state = found / FOLDER if (found / FOLDER).is_dir() else found
        files = _read_manifest(state, source)
        into.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_none(into) as room:
            for name in files:
                (room / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(state / name, room / name)
            _settle(room, into.resolve(), base, data_root)
    return into / "run.yaml"


@contextmanager
def whole_or_none(folder: Path) -> Iterator[Path]:
    """A folder beside another that takes its place at the end, and is gone after an error."""
    room = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    try:
        yield room
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(room, folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _read_manifest(state: Path, source: str) -> list[str]:
    """The files of a state, each checked: inside the folder, of a kind that holds no code, and what was exported."""
    path = state / MANIFEST
    if not path.is_file():
        raise RunError(f"'{source}' holds no state to continue from (no {MANIFEST})", "import an adapter that was exported with its state, or export --as state")
    content = _read_object(path)
    if content.get("format") != FORMAT:
        raise RunError(f"{path} has format {content.get('format')!r}, and this version reads format {FORMAT}", "use the version of llava-keeplora that wrote it")
    files = content.get("files")
    if not isinstance(files, dict) or not {"config.json", "identity.json"} <= files.keys():
        raise RunError(f"{path} lists no run's files", "export the state again")
    for name, expected in files.items():
        if not _inside(name) or not name.endswith(SUFFIXES):
            raise RunError(f"{path} lists '{name}', which is no safetensors or JSON file inside its folder", "do not use this state")
        if not (state / name).resolve().is_relative_to(state.resolve()):
            raise RunError(f"{state / name} is a link that leads out of its folder", "do not use this state, or download it as files")
        checked(state / name, expected, "the export")
    for name in files:
        if name.endswith("journal.jsonl"):
            strangers = {str(PurePosixPath(name).parent / own) for entry in Journal(state / name).entries for own in entry.files} - files.keys()
            if strangers:
                raise RunError(f"{state / name} names '{min(strangers)}', which is not in the state", "do not use this state")
    return list(files)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error})", "export the state again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object", "export the state again")
    return content


def _settle(room: Path, home: Path, base: str | None, data_root: str | None) -> None:
    """Let a copied state's configuration speak of the machine that it is on now, and say it as a user would, too."""
    trees = {name: _read_object(room / name) for name in ("config.json", "identity.json")}
    try:
        for tree in trees.values():
            tree["tasks"] = [str(home / task) if (room / _kept(Path(task).stem)).is_file() and _is_file(task) else task for task in tree["tasks"]]
            if base is not None:
                tree["model"]["name_or_path"], tree["model"]["revision"] = base, None
        config = trees["config.json"]
        config["output_dir"], config["data"]["root"] = str(home), data_root
        written = config | {"methods": {label: _as_written(method) for label, method in config["methods"].items()}}
        for recipe in room.glob("recipes/*.yaml"):
            facts = _read_object(recipe)
            if facts["source"]["format"] != "hub" and not _inside(facts["source"].get("path", "x")):
                raise RunError(f"the recipe {recipe.name} reads '{facts['source']['path']}', outside the data folder", "do not use this state")
        if any(_is_file(task) and not (room / "recipes" / Path(task).name).is_file() for task in config["tasks"]):
            raise RunError("the state's configuration names a recipe that is not in it", "export the state again")
        parse_config(written)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the state's configuration is not what a run writes ({error!r})", "export the state again") from error
    for name, tree in trees.items():
        write_bytes(room / name, (json.dumps(tree, indent=2) + "\n").encode())
    # JSON is YAML.
    write_bytes(room / "run.yaml", (json.dumps(written, indent=1) + "\n").encode())


def _as_written(method: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved method as a user writes it."""
    return {"method": method["method"], **method["options"], "parts": method["parts"], "training": method["training"]}
