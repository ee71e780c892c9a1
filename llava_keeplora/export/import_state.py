"""A run folder made of a published adapter or an exported state.

Nothing in it is believed before it is checked.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.config import REFERENCE_PLACES, ROW_KEYS, parse_config
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.export.hub import download
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.export.loaded_run import checked
from llava_keeplora.export.state import FOLDER, FORMAT, MANIFEST, RECORD, SUFFIXES, public, stays_inside
from llava_keeplora.files import whole_folder, write_bytes
from llava_keeplora.journal import Journal
from llava_keeplora.records import read_object
from llava_keeplora.registries import list_plugins
from llava_keeplora.run_folder import CONFIG, IDENTITY, JOURNAL, read_record
from llava_keeplora.saved_run import check_base, load_run, read_identity
from llava_keeplora_eval.plugins import named_plugins
from llava_keeplora_recipes.strict_yaml import is_file_name

AGAIN = "export the state again"


def import_state(
    source: str,
    into: str | Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    data_root: str | None = None,
    allow_plugin: bool = False,
) -> Path:
    """Make a run folder of a published adapter or an exported state, for `train` and `extend` to go on with.

    Args:
        source: a folder, or a Hub id.
        into: the run folder to make; new or empty.
        revision: on the Hub.
        base: a folder with the base, or another id of it; as the state says when None.
        data_root: the folder with the data sets.
        allow_plugin: whether a method or model family that the state names and that is not built in may be
            imported, as it is installed here; a state brings no code.

    Returns:
        the run's configuration as a YAML file, in the folder.

    Raises:
        ConfigError: for a target that is in use, or a source that is neither a folder nor on the Hub.
        RunError: for a source without a state, or with one that is damaged or leads out of its folder.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(
            f"{into} is there already and not an empty folder", "choose another one with --into"
        )
    with ExitStack() as held:
        if Path(source).is_dir():
            found = Path(source)
        else:
            found = download(source, revision, Path(held.enter_context(tempfile.TemporaryDirectory())))
        state = found / FOLDER if (found / FOLDER).is_dir() else found
        _check_export(found)
        files = _read_manifest(state, found, source)
        _check_tasks(state, files, allow_plugin)
        with whole_folder(into) as tmp_dir:
            for name in files:
                (tmp_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(state / name, tmp_dir / name)
            with _named_after(state, tmp_dir):
                _check_plugins(tmp_dir, allow_plugin)
                _localize_config(tmp_dir, into.resolve(), base, data_root)
                config = load_run(tmp_dir)
                check_base(tmp_dir, config.model)
                inspect_state(tmp_dir, config, read_identity(tmp_dir)["tasks"])
    return into / "run.yaml"


def _check_export(folder: Path) -> None:
    """Check every file that the export says it wrote, also those that a run does not need.

    Earlier versions did not say.
    """
    if (folder / RECORD).is_file():
        files = read_object(folder / RECORD, AGAIN).get("files", {})
        if not isinstance(files, dict) or not all(stays_inside(name) for name in files):
            raise RunError(f"{folder / RECORD} lists no files of its folder", AGAIN)
        for name, expected in files.items():
            checked(folder / name, expected, "the export")


def _read_manifest(state: Path, root: Path, source: str) -> list[str]:
    """The files of a state, each checked.

    Inside the root, of a kind that holds no code, and what was exported.
    """
    path = state / MANIFEST
    if not path.is_file():
        raise RunError(
            f"'{source}' holds no state to continue from (no {MANIFEST})",
            "import an adapter that was exported with its state, or export --as state",
        )
    content = read_object(path, AGAIN)
    if content.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {content.get('format')!r}, and this version reads format {FORMAT}",
            "use the version of llava-keeplora that wrote it",
        )
    files = content.get("files")
    if not isinstance(files, dict) or not {CONFIG, IDENTITY} <= files.keys():
        raise RunError(f"{path} lists no run's files", AGAIN)
    for name, expected in files.items():
        if not stays_inside(name) or not name.endswith(SUFFIXES):
            raise RunError(
                f"{path} lists '{name}', which is no safetensors or JSON file inside its folder",
                "do not use this state",
            )
        if not (state / name).resolve().is_relative_to(root.resolve()):
            raise RunError(
                f"{state / name} is a link that leads out of its folder",
                "do not use this state, or download it as files",
            )
        checked(state / name, expected, "the export")
    for name in files:
        if name.endswith(JOURNAL):
            strangers = {
                str(PurePosixPath(name).parent / own)
                for entry in Journal(state / name).entries
                for own in entry.files
            } - files.keys()
            if strangers:
                raise RunError(
                    f"{state / name} names '{min(strangers)}', which is not in the state",
                    "do not use this state",
                )
    return list(files)


def _check_tasks(state: Path, files: list[str], allow: bool) -> None:
    """Refuse metrics and readers that are plug-ins in the state's recipes, unless they are allowed.

    None is imported.

    Raises:
        RunError: one is named and not allowed, or by a path.
        RecipeError: a recipe cannot be read.
    """
    for name in files:
        if not is_file_name(name):
            continue
        for kind, plugin in named_plugins(state / name):
            if "/" in plugin or "\\" in plugin:
                raise RunError(
                    f"{state / name} names the {kind} '{plugin}' by a path", "do not use this state"
                )
            if not allow:
                raise RunError(
                    f"{state / name} names the {kind} '{plugin}', which is not built in and would be "
                    "executed",
                    "add --allow-plugin if you trust the one that is installed here",
                )


@contextmanager
def _named_after(state: Path, tmp_dir: Path) -> Iterator[None]:
    """Let errors speak of the state rather than of its copy."""
    try:
        yield
    except UserError as error:
        kind = type(error) if isinstance(error, ConfigError | RunError) else RunError
        raise kind(error.problem.replace(str(tmp_dir), str(state)), error.cure) from error


def _check_plugins(tmp_dir: Path, allow: bool) -> None:
    """Refuse plug-ins that the owner of the new run has not allowed, before any of them is imported.

    Raises:
        RunError: one is named and not allowed, by a path, or is here with another source than it had.
        PluginError: one is not installed here.
    """
    trees = [read_record(tmp_dir / name, AGAIN) for name in (CONFIG, IDENTITY)]
    for registry, name, source in [plugin for tree in trees for plugin in list_plugins(tree)]:
        if not isinstance(name, str) or "/" in name or "\\" in name or registry.portable_name(name) != name:
            raise RunError(f"the state names the {registry.kind} '{name}' by a path", "do not use this state")
        if not allow:
            raise RunError(
                f"the state names the {registry.kind} '{name}', which is not built in and would be executed",
                "add --allow-plugin if you trust the one that is installed here",
            )
        if source and registry.source_files(registry.localize(name)) != source:
            raise RunError(
                f"the {registry.kind} '{name}' that is installed here has another source than the state was "
                "made with",
                "install the version that it was made with",
            )


def _localize_config(tmp_dir: Path, home: Path, base: str | None, data_root: str | None) -> None:
    """Adapt a copied state's configuration to this machine, and write it as a user would, too.

    Args:
        tmp_dir: the copy.
        home: where it will be.
        base, data_root: see `import_state`.
    """
    trees = {name: read_record(tmp_dir / name, AGAIN) for name in (CONFIG, IDENTITY)}
    try:
        for tree in trees.values():
            tree["tasks"] = [str(home / task) if is_file_name(task) else task for task in tree["tasks"]]
            if base is not None:
                tree["model"]["name_or_path"], tree["model"]["revision"] = base, None
        config = trees[CONFIG]
        config["output_dir"], config["data"]["root"] = str(home), data_root
        _check_recipes(tmp_dir, home, config["tasks"])
        for section in (config, *config["methods"].values()):
            if private := section["training"].keys() - public(section["training"]).keys():
                raise RunError(
                    f"the state's configuration sets training.{min(private)}, which is for you to set",
                    "do not use this state",
                )
        for name in [
            method["options"].get(key) for method in config["methods"].values() for key in REFERENCE_PLACES
        ]:
            if name is not None and not stays_inside(name):
                raise RunError(
                    f"the state's configuration reads '{name}', outside the data folder",
                    "do not use this state",
                )
        written = config | {
            "methods": {
                label: _without_inherited_values(method) for label, method in config["methods"].items()
            }
        }
        parse_config(written)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the state's configuration is not what a run writes ({error!r})", AGAIN) from error
    for name, tree in trees.items():
        write_bytes(tmp_dir / name, (json.dumps(tree, indent=2) + "\n").encode())
    # JSON is YAML.
    write_bytes(tmp_dir / "run.yaml", (json.dumps(written, indent=1) + "\n").encode())


def _check_recipes(tmp_dir: Path, home: Path, tasks: list[str]) -> None:
    """Refuse tasks that read a recipe from elsewhere, and recipes that read data from elsewhere."""
    recipes = {
        str(home / path.relative_to(tmp_dir)): read_object(path, AGAIN)
        for path in tmp_dir.glob("recipes/*.yaml")
    }
    for task in tasks:
        if is_file_name(task) and task not in recipes:
            raise RunError(
                f"the state's configuration names the recipe '{task}', which is not in it",
                "do not use this state",
            )
    for name, facts in recipes.items():
        if "extends" in facts:
            raise RunError(f"the recipe {Path(name).name} extends another", "do not use this state")
        path = facts["source"].get("path", "none")
        if facts["source"]["format"] != "hub" and not stays_inside(path):
            raise RunError(
                f"the recipe {Path(name).name} reads '{path}', outside the data folder",
                "do not use this state",
            )


def _without_inherited_values(method: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved method as a user writes it."""
    row = {key: method[key] for key in ROW_KEYS if key in method}
    return {
        "method": method["method"],
        **method["options"],
        "parts": method["parts"],
        "training": method["training"],
        **row,
    }
