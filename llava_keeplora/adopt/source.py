"""Where an adopted update comes from: a PEFT adapter or a merged checkpoint, in a folder or on the Hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llava_keeplora.adapters import Delta, Deltas, FullDelta
from llava_keeplora.adopt.checkpoint import fill_modules, read_checkpoint
from llava_keeplora.adopt.peft_adapter import CONFIG, WEIGHTS, read_adapter, read_config
from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.export.hub import download
from llava_keeplora.methods import Changed
from llava_keeplora.models import Family, load_model
from llava_keeplora.records import read_object
from llava_keeplora.run_folder import BASE, IDENTITY
from llava_keeplora.run_folder import CONFIG as RUN_CONFIG
from llava_keeplora_eval.checkpoints import HUB_ID, weight_files
from llava_keeplora_eval.content import changes_at, content_changes, model_content, tensors_hash
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.models import EXPORT, resolve_model

logger = logging.getLogger(__name__)

ADAPTER, CHECKPOINT = "adapter", "checkpoint"
OTHER_BASE = "adopt it into a run of the base that it was trained on"


@dataclass(frozen=True)
class Source:
    """An adapter or checkpoint that was found.

    Args:
        name: its name for people, without a path of this machine: a folder's name, or the id on the Hub.
        folder: where its files are.
        form: `adapter` or `checkpoint`.
        sha256: a hash of what it holds.
    """

    name: str
    folder: Path
    form: str
    sha256: str

    def record(self) -> dict[str, str]:
        """Return what a run records of it."""
        return {"source": self.name, "form": self.form, "sha256": self.sha256}


@dataclass(frozen=True)
class Update:
    """An update that was trained elsewhere.

    Args:
        source: where it comes from.
        deltas: module name → its change.
    """

    source: Source
    deltas: Deltas


def find_source(place: str) -> Source:
    """Find an adapter or a checkpoint.

    Args:
        place: a folder, or `user/name` or `user/name@revision` on the Hub.

    Raises:
        RunError: the folder holds neither, or files of one are missing.
        ConfigError: the place is neither a folder nor a valid name on the Hub.
    """
    folder, name = Path(place).expanduser(), Path(place).resolve().name
    if not folder.is_dir():
        name, _, revision = place.partition("@")
        folder = download(name, revision or None, None)
    if (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
        read_config(folder)
        if not (folder / WEIGHTS).is_file():
            raise RunError(
                f"{folder} holds no {WEIGHTS}", "save the adapter as safetensors, with save_pretrained"
            )
        hashes = "".join(file_hash(folder / file) for file in (CONFIG, WEIGHTS))
        return Source(name, folder, ADAPTER, hashlib.sha256(hashes.encode()).hexdigest())
    if (folder / IDENTITY).is_file() and (folder / RUN_CONFIG).is_file():
        raise RunError(
            f"{folder} is a run folder", "export what it learned, --as adapter or --as merged, and adopt that"
        )
    if weight_files(folder):
        return Source(name, folder, CHECKPOINT, tensors_hash(folder))
    raise RunError(
        f"{folder} holds neither a PEFT adapter ({CONFIG}) nor a checkpoint", "give the folder of one"
    )


def check_unchanged(place: str, recorded: Mapping[str, Any], task: str, run: Path) -> None:
    """Check that a source is the one that a run has read; one that is gone is not needed.

    Args:
        place: see `find_source`.
        recorded: what the run recorded of it; see `Source.record`.
        task: the task's name, for the error.
        run: the run's or the method's folder, for the error.

    Raises:
        RunError: it has changed.
    """
    try:
        now = find_source(place)
    except UserError:
        return
    if now.sha256 != recorded["sha256"]:
        raise RunError(
            f"{now.folder} has changed since {run} took it over as task '{task}'",
            "restore it to go on, or fork the run before that task",
        )


def read_update(
    source: Source,
    model: ModelConfig,
    base: Mapping[str, Any] | None,
    family: Family,
    loaded: nn.Module | None = None,
) -> Update:
    """Read an update of a run's base.

    Args:
        source: where it comes from.
        model: the configuration of the run's base.
        base: the record of its content, if there is one; see `base_record`.
        family: the base's family; the names and shapes of its layers are read.
        loaded: the base with the weights of its files, if it is in memory; they are loaded for a checkpoint
            when None.

    Raises:
        RunError: it is of another base, damaged, or of a kind that cannot be read exactly.
        EvalError: a checkpoint or its base cannot be loaded.
    """
    if source.form == CHECKPOINT:
        if loaded is None:
            loaded = load_model(replace(model, dtype="float32", quantization=None)).model
        return Update(source, read_checkpoint(source.folder, loaded, family.auto_class))
    _check_base(source.folder, model, base)
    layers = {name: m for name, m in family.model.named_modules() if isinstance(m, nn.Linear)}
    return Update(source, read_adapter(source.folder, layers))


def _check_base(folder: Path, model: ModelConfig, base: Mapping[str, Any] | None) -> None:
    """Refuse an adapter that was certainly trained on another base than the run's; warn if that is open.

    An adapter names its base. Two folders are compared by content, two names on the Hub by name. A merged
    export of a run on the same base is accepted, as the adapter was trained on what such a run knew.

    Raises:
        RunError: naming both.
    """
    named = read_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        logger.warning("%s names no base model; only its layers are compared with the run's", folder)
        return
    place, own = resolve_model(named), resolve_model(model.name_or_path)
    if place == own or named == model.name_or_path:
        return
    record = Path(place) / EXPORT
    if record.is_file() and base and (known := read_object(record).get(BASE)):
        differ = content_changes(base, known)
    elif Path(place).is_dir():
        differ = _changes(base, own, model.revision, place)
    elif Path(own).is_dir() or not HUB_ID.fullmatch(named):
        logger.warning(
            "%s was trained on '%s', which is not on this machine; that it is the run's base, '%s', is not "
            "checked beyond names and shapes of layers",
            folder,
            named,
            model.name_or_path,
        )
        return
    else:
        differ = ["names"]
    if differ and set(differ) & {"weights", "names", "config"}:
        raise RunError(
            f"{folder} was trained on the base '{named}', and the run's base is '{model.name_or_path}' "
            f"({', '.join(differ)} differ)",
            OTHER_BASE + "; if both are one model, correct base_model_name_or_path in its " + CONFIG,
        )


def _changes(base: Mapping[str, Any] | None, own: str, revision: str | None, place: str) -> list[str] | None:
    """Return what differs between the run's base and a folder; None where that cannot be said."""
    try:
        return changes_at(base or model_content(own, revision), place)
    except (EvalError, OSError):
        return None


def check_layers(update: Update, label: str, changed: Changed) -> Deltas:
    """Return an update's deltas as a method takes them, which changes these modules.

    Args:
        update: the update.
        label: the method's label.
        changed: the modules that it changes.

    Raises:
        RunError: the update changes something else, or more of a layer than its weight.
    """
    deltas, name = update.deltas, update.source.folder
    beyond = [layer for layer in deltas if layer not in changed.modules]
    if beyond:
        first = ".".join(filter(None, [beyond[0], next(iter(deltas[beyond[0]].changes()))]))
        raise RunError(
            f"{name} changes {len(beyond)} modules that '{label}' does not train (first '{first}')",
            "adopt it into a run whose `parts` name them, if it was trained on that run's base",
        )
    for layer in changed.adapted:
        delta = deltas.get(layer)
        if isinstance(delta, FullDelta) and set(delta.parameters) != {"weight"}:
            raise RunError(
                f"{name} changes the bias of '{layer}', which no projection keeps from what is protected",
                "train it without biases",
            )
    low = [layer for layer in changed.full if isinstance(deltas.get(layer), Delta)]
    dense = {layer: FullDelta(deltas[layer].changes()) for layer in low}
    if not changed.full:
        return deltas
    return fill_modules({**deltas, **dense}, changed.full)
