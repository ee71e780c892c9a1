"""Import of a published adapter or an exported state into a new run folder.

The source is not trusted: every file is checked before it is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.config import REFERENCE_PLACES, ROW_KEYS, parse_config, without_idle_options
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.export.hub import download
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.export.loaded_run import checked
from llava_keeplora.export.state import FOLDER, FORMAT, MANIFEST, RECORD, SUFFIXES, public, stays_inside
from llava_keeplora.files import whole_folder, write_bytes
from llava_keeplora.journal import Journal
from llava_keeplora.records import read_object
from llava_keeplora.registries import list_plugins, localize_plugins
from llava_keeplora.run_folder import CONFIG, IDENTITY, JOURNAL, RECIPES, read_record, rename_parts
from llava_keeplora.saved_run import check_base, load_run, read_identity
from llava_keeplora_eval.plugins import named_plugins
from llava_keeplora_recipes.strict_yaml import is_file_name

#: The cure of a damaged state.
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
    """Create a run folder from a published adapter or an exported state, which `train` and `extend` continue.

    Args:
        source: a folder, or a Hub id.
        into: the run folder to create; new or empty.
        revision: a branch, tag or commit on the Hub; the newest when None.
        base: a folder with the base model, or another id of it; the state's own when None.
        data_root: the folder with the data sets.
        allow_plugin: whether plug-ins that the state names may be imported; they must be installed here, as a
            state contains no code.

    Returns:
        the run's configuration as a YAML file, in the folder.

    Raises:
        ConfigError: the target is in use, or the source is neither a folder nor on the Hub.
        RunError: the source has no state, or one that is damaged or reads files outside its folder.
        PluginError: a plug-in that the state names is not installed here.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(
            f"{into} is there already and not an empty folder", "choose another one with --into"
        )
    with ExitStack() as temporary:
        if Path(source).is_dir():
            export = Path(source)
        else:
            export = download(source, revision, Path(temporary.enter_context(tempfile.TemporaryDirectory())))
        state = export / FOLDER if (export / FOLDER).is_dir() else export
        _check_export(export)
        files = _read_manifest(state, export, source)
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
    """Check the hash of every file that `export.json` lists, including those that a run does not need.

    Exports of earlier versions have no such list and are not checked here.

    Raises:
        RunError: a file is missing or changed, or the list names files outside the folder.
    """
    if (folder / RECORD).is_file():
        files = read_object(folder / RECORD, AGAIN).get("files", {})
        if not isinstance(files, dict) or not all(stays_inside(name) for name in files):
            raise RunError(f"{folder / RECORD} lists no files of its folder", AGAIN)
        for name, expected in files.items():
            checked(folder / name, expected, "the export")


def _read_manifest(state: Path, root: Path, source: str) -> list[str]:
    """Return the names of a state's files, after checking each of them.

    Every file must be inside the root, be of a format that holds no code, and have the hash that was
    recorded; journals must name files of the state alone.

    Raises:
        RunError: naming the first file that breaks a rule.
    """
    path = state / MANIFEST
    if not path.is_file():
        raise RunError(
            f"'{source}' holds no state to continue from (no {MANIFEST})",
            "import an adapter that was exported with its state, or say what it learned with --task",
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
            unlisted = {
                str(PurePosixPath(name).parent / file)
                for entry in Journal(state / name).entries
                for file in entry.files
            } - files.keys()
            if unlisted:
                raise RunError(
                    f"{state / name} names '{min(unlisted)}', which is not in the state",
                    "do not use this state",
                )
    return list(files)


def _check_tasks(state: Path, files: list[str], allow: bool) -> None:
    """Refuse plug-in metrics and readers in the state's recipes, unless they are allowed; none is imported.

    Raises:
        RunError: a plug-in is not allowed, or is named by a path.
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
    """Replace the path of the temporary copy by the state's in errors of a block."""
    try:
        yield
    except UserError as error:
        kind = type(error) if isinstance(error, ConfigError | RunError) else RunError
        raise kind(error.problem.replace(str(tmp_dir), str(state)), error.cure) from error


def _check_plugins(tmp_dir: Path, allow: bool) -> None:
    """Refuse plug-in methods and families unless they are allowed, before any of them is imported.

    Raises:
        RunError: a plug-in is not allowed, is named by a path, or its source differs from the recorded one.
        PluginError: a plug-in is not installed here.
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
    """Adapt a copied state's configuration to this machine, and write it as `run.yaml` as well.

    Args:
        tmp_dir: the copy.
        home: the run folder that it will become.
        base, data_root: see `import_state`.

    Raises:
        RunError: the configuration is malformed, or sets or reads what a state must not.
    """
    trees = {name: rename_parts(read_record(tmp_dir / name, AGAIN)) for name in (CONFIG, IDENTITY)}
    try:
        for tree in trees.values():
            tree["tasks"] = [str(home / task) if is_file_name(task) else task for task in tree["tasks"]]
            if base is not None:
                tree["model"]["name_or_path"], tree["model"]["revision"] = base, None
        # A plug-in that was found in the working folder is found from any other, as after `train`.
        config = trees[CONFIG] = localize_plugins(trees[CONFIG])
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
        parse_config(written, recorded=True)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the state's configuration is not what a run writes ({error!r})", AGAIN) from error
    for name, tree in trees.items():
        write_bytes(tmp_dir / name, (json.dumps(tree, indent=2) + "\n").encode())
    # JSON is YAML.
    write_bytes(tmp_dir / "run.yaml", (json.dumps(written, indent=1) + "\n").encode())


def _check_recipes(tmp_dir: Path, home: Path, tasks: list[str]) -> None:
    """Refuse tasks whose recipe is outside the state, and recipes whose data are outside the data folder."""
    recipes = {
        str(home / path.relative_to(tmp_dir)): read_object(path, AGAIN)
        for path in (tmp_dir / RECIPES).glob("*.yaml")
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
    """Return a resolved method in the form of a user's YAML, without values inherited from the run's."""
    row = {key: method[key] for key in ROW_KEYS if key in method}
    return {
        "method": method["method"],
        **without_idle_options(method["method"], method["options"]),
        "parts": method["parts"],
        "training": method["training"],
        **row,
    }
