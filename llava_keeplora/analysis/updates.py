"""Where a run's updates lie: in the weights' principal subspace, in earlier tasks' features, or outside both.

Legend: ΔW (out, in) a task's update of a layer, W_p (in, k) the principal input directions of the base's
weight at the run's ε_w, M (in, m) the feature directions that earlier tasks added. A share is ‖ΔW U‖² / ‖ΔW‖²
for U an orthonormal basis.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_keeplora.adapters import Delta, FullDelta, dense_weight
from llava_keeplora.adapters.deltas import Deltas
from llava_keeplora.analysis.results import MethodUpdates, Update
from llava_keeplora.config import AUTO, PartConfig
from llava_keeplora.errors import RunError
from llava_keeplora.export.loaded_run import LearnedRun, checked, load_learned_run
from llava_keeplora.files import read_tensors
from llava_keeplora.journal import Journal
from llava_keeplora.models import load_model
from llava_keeplora.models.layouts import part_of
from llava_keeplora.report.overlap import overlap
from llava_keeplora.run_folder import CONSOLIDATED, DELTA, JOURNAL, STATE, Stage, read_dumped, read_record
from llava_keeplora.saved_run import check_base, read_identity
from llava_keeplora.subspace import principal_basis, residual
from llava_keeplora_eval.predictors import default_device

logger = logging.getLogger(__name__)

#: Directions whose residual outside a basis is shorter than this count as inside it.
DEPENDENT = 1e-5


def analyze_run(run: str | Path) -> dict[str, MethodUpdates]:
    """Measure where the updates of every method of a run lie.

    Args:
        run: the run folder; nothing in it is changed.

    Returns:
        label → its updates.

    Raises:
        RunError: the folder is no run, no task of it is finished, or a file was damaged.
        ConfigError: the base model is not found.
    """
    run = Path(run)
    learned = {label: load_learned_run(run, label) for label in _finished(run)}
    features = {label: _added_directions(method_run) for label, method_run in learned.items()}
    check_base(run, next(iter(learned.values())).model)
    return _measure_all(run, learned, features, _chosen_energies(learned.values()))


def _measure_all(
    run: Path,
    learned: Mapping[str, LearnedRun],
    features: Mapping[str, list[dict[str, Tensor]]],
    chosen: Mapping[str, float],
) -> dict[str, MethodUpdates]:
    """Measure the updates of every method, layer by layer.

    Methods that change no linear layer are left out with a warning.
    """
    names, family = read_identity(run)["tasks"], load_model(next(iter(learned.values())).model)
    changed = dict.fromkeys(name for method in learned.values() for task in method.deltas for name in task)
    layers = [
        name
        for name in changed
        if isinstance(family.model.get_submodule(name), nn.Linear) and part_of(name, family.parts)
    ]
    updates: dict[str, list[Update]] = {label: [] for label in learned}
    for layer in tqdm(layers, desc="analyze", delay=2, disable=None):
        part, weight = (
            part_of(layer, family.parts),
            dense_weight(family.model.get_submodule(layer)).detach().to(default_device()),
        )
        energies = {
            label: _energy(
                PartConfig(**method.config["methods"][label]["parts"].get(part, {})), chosen.get(part)
            )
            for label, method in learned.items()
        }
        bases = {energy: principal_basis(weight, energy).basis.cpu() for energy in set(energies.values())}
        for label, method in learned.items():
            updates[label] += _measure_layer(
                layer, part, names, method.deltas, bases[energies[label]], features[label]
            )
    unchanged = [label for label in learned if not updates[label]]
    if len(unchanged) == len(learned):
        raise RunError(
            f"no method of {run} changes the weights of a linear layer, so there are no updates to measure",
            "analyze a run of another method",
        )
    if unchanged:
        logger.warning("left out, for they change no linear layer's weights: %s", ", ".join(unchanged))
    return {
        label: MethodUpdates(names[: len(method.deltas)], updates[label], _overlap(method))
        for label, method in learned.items()
        if updates[label]
    }


def _measure_layer(
    layer: str,
    part: str,
    tasks: Sequence[str],
    deltas: Sequence[Deltas],
    principal: Tensor,
    features: Sequence[Mapping[str, Tensor]],
) -> list[Update]:
    """Measure the updates of a layer, task by task, against the features of the tasks before each."""
    updates, earlier = [], principal.new_zeros(len(principal), 0)
    for task, changes, added in zip(tasks, deltas, features):
        if layer in changes:
            updates.append(measure(task, part, layer, changes[layer], principal, earlier))
        if layer in added:
            earlier = torch.cat([earlier, added[layer]], dim=1)
    return updates


def _energy(settings: PartConfig, chosen: float | None) -> float:
    """Return ε_w of a part; where it is `auto` and a method has chosen it, the chosen one."""
    return chosen if settings.energy_weight == AUTO and chosen else settings.energy("energy_weight")


def _finished(run: Path) -> list[str]:
    """Return the labels of the run's methods that have finished a task."""
    labels = [
        label
        for label in read_dumped(run)["methods"]
        if any(entry.task and entry.stage == Stage.CLOSED for entry in Journal(run / label / JOURNAL).entries)
    ]
    if not labels:
        raise RunError(f"{run} holds no finished task", "run its training first")
    return labels


def _added_directions(learned: LearnedRun) -> list[dict[str, Tensor]]:
    """Return for every task: layer → the directions (in, m) that the task added to its protected subspace.

    The mappings are empty for methods without protected subspaces.
    """
    folder, directions = learned.run / learned.label, []
    for entry in learned.entries:
        if entry.task and entry.stage == Stage.CONSOLIDATED:
            states = [name for name in entry.files if name.endswith(STATE)]
            directions.append(
                read_tensors(checked(folder / states[0], entry.files[states[0]], f"task {entry.task}"))
                if states
                else {}
            )
    return directions


def _chosen_energies(learned: Iterable[LearnedRun]) -> dict[str, float]:
    """Return part → the ε_w that a method of the run has chosen from the data, where it is `auto`."""
    energies: dict[str, float] = {}
    for method in learned:
        base = next(entry for entry in method.entries if entry.stage == Stage.CONSOLIDATED)
        name = base.file(CONSOLIDATED)
        path = checked(method.run / method.label / name, base.files[name], "the base")
        energies |= {
            part: choice["energy"] for part, choice in read_record(path).get("energy_weight", {}).items()
        }
    return energies


def _overlap(learned: LearnedRun) -> list[list[float | None]] | None:
    trained = [entry for entry in learned.entries if entry.stage == Stage.TRAINED]
    return overlap([learned.run / learned.label / entry.file(DELTA) for entry in trained])


def measure(
    task: str, part: str, layer: str, delta: Delta | FullDelta, principal: Tensor, features: Tensor
) -> Update:
    """Measure where one update lies.

    Args:
        task, part, layer: their names.
        delta: ΔW.
        principal: W_p (in, k), orthonormal columns.
        features: M (in, m); its share inside W_p counts as principal.
    """
    rows, outside_principal = _rows(delta), _complement(features, principal)
    energy = float(rows.square().sum())
    shares: list[float | None] = [None] * 3
    if energy:
        inside = [
            float((rows @ basis.double()).square().sum()) / energy for basis in (principal, outside_principal)
        ]
        shares = [*inside, max(0.0, 1.0 - sum(inside))]
    width, k = principal.shape
    return Update(task, part, layer, width, k, outside_principal.shape[1], energy, *shares)


def _rows(delta: Delta | FullDelta) -> Tensor:
    """Return a matrix (r, in) or (out, in) that has ΔW's energy in every input direction.

    For ΔW = scale · B A it is R A with the QR decomposition scale · B = Q R, as Q preserves lengths.
    """
    if isinstance(delta, FullDelta):
        return delta.dense().double()
    return torch.linalg.qr(delta.scale * delta.B.double()).R @ delta.A.double()


def _complement(columns: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis of what columns (in, m) span outside a basis (in, k)."""
    left, singular, _ = torch.linalg.svd(residual(columns.double().T, basis).T, full_matrices=False)
    return left[:, singular > DEPENDENT]
