"""Checks of an imported state's contents against its own configuration and the base.

Its hashes prove only that no file was damaged on the way, not that the contents are plausible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_keeplora.adapters import Delta, load_deltas
from llava_keeplora.config import ZERO_SHOT, RunConfig, make_method
from llava_keeplora.errors import RunError
from llava_keeplora.files import read_tensors
from llava_keeplora.journal import Entry, Journal, open_stages
from llava_keeplora.methods import METHODS, Changed, Holding, Method, TaskContext, find_changed
from llava_keeplora.models import DTYPES, open_model
from llava_keeplora.run_folder import (
    CAPACITY,
    CONSOLIDATED,
    DELTA,
    JOURNAL,
    KEPT,
    MATRIX,
    PREPARED,
    SCHEMAS,
    SCORES,
    STATE,
    Capacity,
    Stage,
    read_record,
)
from llava_keeplora_eval import Matrix

CURE = "do not use this state"
#: Largest allowed absolute value; no weight, update or statistic of a trained model comes near it. Whole
#: numbers may be positions or hashes and have no such limit.
LARGEST = 1e6
#: How far a basis may be from orthonormal (what a run writes is within 1e-5), and the number of random
#: vectors that test it.
TOLERANCE, PROBES = 1e-3, 16


def inspect_state(folder: Path, config: RunConfig, names: list[str]) -> None:
    """Refuse a state whose files contradict its configuration or the base.

    Args:
        folder: the state, laid out as a run folder.
        config: its configuration.
        names: names of its tasks.

    Raises:
        RunError: naming the file, the record or tensor, and the rule.
        ConfigError: the base model is not found.
    """
    family = open_model(config.model, config.evaluation)
    family.skeleton(DTYPES[config.model.dtype])
    for label in (ZERO_SHOT, *config.methods):
        cls = METHODS[config.methods[label].method if label in config.methods else ZERO_SHOT]
        journal = Journal(folder / label / JOURNAL)
        open_stages(journal.entries, len(names), cls.trainable)
        if not any(entry.stage == Stage.CLOSED and entry.task >= cls.trainable for entry in journal.entries):
            raise RunError(f"{journal.path} has no finished {'task' if cls.trainable else 'base'}", CURE)
        for name in journal.files():
            if Path(name).name in SCHEMAS:
                _check_record(folder / label / name, names)
        _check_matrix(folder / label / MATRIX, names)
        if cls.trainable:
            settings = config.methods[label]
            changed = find_changed(cls, settings.parts, family)
            _MethodState(folder / label, make_method(settings), changed, family.model, names).check(
                journal.entries
            )


def _check_record(path: Path, names: list[str]) -> None:
    record = read_record(path, CURE)
    if path.name == SCORES and (unknown := record.keys() - set(names)):
        raise RunError(f"{path} has a score of task '{min(unknown)}', which the state does not have", CURE)


def _check_matrix(path: Path, names: list[str]) -> None:
    if Matrix.from_json(path).tasks != names:
        raise RunError(f"{path} is of other tasks than the state's, {', '.join(names)}", CURE)


class _MethodState:
    """Tensors of one method's tasks, to be checked.

    Args:
        folder: the method's folder.
        method: the method.
        changed: the layers of the base that it changes.
        model: the base, without weights.
        names: names of the tasks.
    """

    def __init__(
        self, folder: Path, method: Method, changed: Changed, model: torch.nn.Module, names: list[str]
    ):
        self.folder, self.method, self.changed, self.model, self.names = folder, method, changed, model, names
        self.bases: dict[str, list[Tensor]] = {}

    def check(self, entries: Iterable[Entry]) -> None:
        """Check every task, the base's stages first.

        Raises:
            RunError: see `inspect_state`.
        """
        tasks: dict[int, dict[str, Path]] = {}
        for entry in entries:
            tasks.setdefault(entry.task, {}).update(
                {Path(name).name: self.folder / name for name in entry.files}
            )
        sizes: list[dict[str, Capacity]] = []
        for index, files in tasks.items():
            if PREPARED in files:
                for name in read_record(files[PREPARED], CURE)["layers"]:
                    self._adapted_layer(files[PREPARED], name)
            if CONSOLIDATED in files:
                capacity = read_record(files[CONSOLIDATED], CURE).get(CAPACITY, {})
                sizes.append({name: Capacity.from_dict(entry) for name, entry in capacity.items()})
                self._check_capacity(files[CONSOLIDATED], sizes[-1])
                if different := sorted(sizes[-1].keys() ^ sizes[0].keys()):
                    raise RunError(
                        f"{files[CONSOLIDATED]} has the capacity of other layers than the base's (first "
                        f"'{different[0][:200]}')",
                        CURE,
                    )
            if DELTA in files:
                self._check_deltas(files[DELTA], files.get(PREPARED))
            self._check_method_tensors(
                index, {name: files[name] for name in (KEPT, STATE) if name in files}, CONSOLIDATED in files
            )

    def _adapted_layer(self, path: Path, name: str) -> torch.nn.Linear:
        if name not in self.changed.adapted:
            raise RunError(
                f"{path} names the layer '{name[:200]}', which the method does not adapt on this base", CURE
            )
        return self.changed.adapted[name].module

    def _check_capacity(self, path: Path, layers: Mapping[str, Capacity]) -> None:
        for name, size in layers.items():
            width = self._adapted_layer(path, name).in_features
            if size.width != width or size.protected > width:
                raise RunError(
                    f"{path} has another width of layer '{name}' than the base's {width}",
                    CURE,
                )

    def _check_deltas(self, path: Path, prepared: Path | None) -> None:
        deltas = load_deltas(path)
        adapted = {name for name, delta in deltas.items() if isinstance(delta, Delta)}
        adopted = prepared is not None and "adopted" in read_record(prepared, CURE)["report"]
        if (
            prepared is not None
            and not adopted
            and adapted != (initial := read_record(prepared, CURE)["layers"].keys())
        ):
            raise RunError(
                f"{path} has deltas of other layers than {prepared.name} begins with (the first is "
                f"'{min(adapted ^ initial)[:200]}')",
                CURE,
            )
        modules, dense = self.changed.modules, adopted or self.method.dense_updates
        for name, delta in deltas.items():
            low_rank = isinstance(delta, Delta)
            # What is adopted, or trained so, may change all of an adapted layer's weight.
            as_trained = (name in self.changed.adapted) == low_rank or (dense and not low_rank)
            if name not in modules or not as_trained:
                raise RunError(
                    f"{path} changes '{name[:200]}', which the method does not train on this base", CURE
                )
            if isinstance(delta, Delta):
                layer, rank = modules[name], delta.A.shape[0] if delta.A.dim() else 0
                shapes = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
                if not rank > 0 or not abs(delta.scale) <= LARGEST:
                    raise RunError(
                        f"{path} has a delta of rank {rank} and scale {delta.scale:g} in layer '{name}'", CURE
                    )
            else:
                shapes = {
                    key: tuple(p.shape)
                    for key, p in modules[name].named_parameters(recurse=False)
                    if key == "weight" or name in self.changed.full
                }
                if delta.tensors.keys() != shapes.keys():
                    raise RunError(
                        f"{path} lacks changes of, or adds parameters to, '{name}', which has "
                        f"{', '.join(shapes)}",
                        CURE,
                    )
            for key, value in delta.tensors.items():
                _check_tensor(path, f"{name}.{key}", value, Holding(shapes[key]), {})
        # A method of several tasks' data may train nothing with a task.
        trains = bool(deltas) or not self.method.mixes
        if trains and (missing := self.changed.full.keys() - deltas.keys()):
            raise RunError(
                f"{path} lacks the change of '{min(missing)}', which the method trains in full", CURE
            )

    def _check_method_tensors(self, index: int, files: Mapping[str, Path], finished: bool) -> None:
        """Check what the method itself keeps of a task: declared names and shapes, none missing."""
        tensors = {
            name: (path, value) for path in files.values() for name, value in read_tensors(path).items()
        }
        context = TaskContext(
            index,
            self.names[index - 1] if index else "base",
            self.changed.adapted,
            None,
            None,
            0,
            0,
            model=self.model,
        )
        declared = self.method.holds(context, tensors.keys())
        lengths: dict[str, int] = {}
        for name, (path, value) in tensors.items():
            if name not in declared:
                raise RunError(
                    f"{path} has the tensor '{name[:200]}', which '{self.method.info.name}' does not keep on "
                    "this base",
                    CURE,
                )
            _check_tensor(path, name, value, declared[name], lengths)
        missing = [name for name, holding in declared.items() if holding.required and name not in tensors]
        if missing and finished:
            raise RunError(
                f"{self.folder} lacks the tensor '{missing[0]}' of task {index}, which "
                f"'{self.method.info.name}' keeps",
                CURE,
            )
        for name, (path, value) in tensors.items():
            for layer in declared[name].basis:
                self.bases.setdefault(layer, []).append(value)
                _check_orthonormal(path, layer, torch.cat(self.bases[layer], dim=1))


def _check_tensor(path: Path, name: str, value: Tensor, declared: Holding, lengths: dict[str, int]) -> None:
    """Check type, shape and numbers of a tensor.

    Args:
        path: the file, for errors.
        name: the tensor's name in it.
        value: the tensor.
        declared: what the method declares of it.
        lengths: named length → its value, collected from all tensors, which must agree.

    Raises:
        RunError: naming the rule that is broken.
    """
    if value.is_floating_point() == declared.integer or value.is_complex() or value.dtype == torch.bool:
        raise RunError(
            f"{path} has '{name}' as {str(value.dtype).removeprefix('torch.')}, and it is "
            f"{'whole numbers' if declared.integer else 'floating point'}",
            CURE,
        )
    expected = [
        lengths.setdefault(length, given) if isinstance(length, str) else given if length is None else length
        for length, given in zip(declared.shape, value.shape)
    ]
    if len(declared.shape) != value.dim() or expected != list(value.shape):
        wanted = ", ".join(
            "any" if length is None else str(lengths.get(length, length)) for length in declared.shape
        )
        raise RunError(
            f"{path} has '{name}' of shape {tuple(value.shape)}, and on this base it is ({wanted})", CURE
        )
    if not torch.isfinite(value).all():
        raise RunError(f"{path} has numbers in '{name}' that are not finite", CURE)
    if declared.below is not None and not ((value >= 0) & (value < declared.below)).all():
        raise RunError(f"{path} has numbers in '{name}' that are not from 0 to {declared.below - 1}", CURE)
    if not declared.integer and value.numel() and float(value.double().abs().max()) > LARGEST:
        raise RunError(f"{path} has numbers in '{name}' above {LARGEST:g}, as no training leaves them", CURE)


def _check_orthonormal(path: Path, layer: str, basis: Tensor) -> None:
    """Check MᵀM = I by random vectors X: (MᵀM − I) X is 0 only if MᵀM = I (with probability 1).

    Args:
        path: the file, for errors.
        layer: the layer's name, for errors.
        basis: M (in, k).

    Raises:
        RunError: M has more columns than rows, or they are not orthonormal.
    """
    basis = basis.double()
    if basis.shape[1] > basis.shape[0]:
        raise RunError(
            f"{path} brings the basis of layer '{layer}' to {basis.shape[1]} columns of {basis.shape[0]} "
            "rows",
            CURE,
        )
    probes = torch.randn(
        basis.shape[1], PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    off = float((basis.T @ (basis @ probes) - probes).abs().max()) if probes.numel() else 0.0
    if off > TOLERANCE:
        raise RunError(
            f"{path} makes the basis of layer '{layer}' one whose columns are not orthonormal ({off:.2g} "
            "off)",
            CURE,
        )
