"""Export of a run as a set of PEFT adapters of one base, between which a server switches.

The adapters of a set are the model after every task ("stage"), so that going back a task is switching an
adapter, or every task's own update ("task"), whose sums are the stages. Each has the smallest rank of
`VLLM_RANKS` that holds it exactly, or to a stated loss. `keeplora_export.json` is the set's manifest.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_keeplora.adapters import AdapterInit, Deltas, attach, detach
from llava_keeplora.config import EXPORT_EXAMPLES
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.adapter import Combined, combine, smallest_rank, write_adapter
from llava_keeplora.export.exported import AdapterSet, Member
from llava_keeplora.export.loaded_run import Base, LearnedRun, filter_parts, load_learned_run, published_base
from llava_keeplora.export.run_export import (
    check_mergeable,
    check_target,
    hashes,
    load_examples,
    part_choice,
    record_of,
)
from llava_keeplora.export.set_card import write_set_card
from llava_keeplora.export.state import FOLDER, RECORD, write_state
from llava_keeplora.export.verify import Deviation, probe, verify_set
from llava_keeplora.files import whole_folder, write_json
from llava_keeplora.models import Family, Usage, open_model
from llava_keeplora.objects import Objects
from llava_keeplora.run_folder import EXPORTS, RENAMED_PARTS, task_folder
from llava_keeplora_recipes import TaskData

SET = "set"
#: What an adapter of a set may hold.
EACH = ("stage", "task")


def export_set(
    run: str | Path,
    into: str | Path | None = None,
    *,
    each: str = "stage",
    loss: float = 0.0,
    label: str | None = None,
    at_task: int | None = None,
    parts: Sequence[str] | None = None,
    with_state: bool = True,
    base_id: str | None = None,
    name: str | None = None,
    examples: int = EXPORT_EXAMPLES,
    data_root: str | None = None,
    objects: Objects = Objects(),
    base_folder: str | None = None,
) -> AdapterSet:
    """Export one adapter per task, compare the logits of each, and write a manifest and a card.

    Args:
        run: the run folder.
        into: a new or empty folder, or an earlier export's; RUN/export/set when None.
        each: `stage` for the model after every task, `task` for every task's own update.
        loss: the largest relative error ‖ΔW − B A‖ / ‖ΔW‖ of a layer (Frobenius norms); 0 for exact adapters.
        label, at_task, parts, with_state, base_id, name, examples, data_root, objects, base_folder: as for
            `export_run`.

    Raises:
        RunError: a folder is no run, a task is not finished, a file is damaged, or an adapter gives other
            logits after loading.
        ConfigError: LoRA adapters cannot hold what was learned, or not within the loss at any rank; the
            target is in use, or options are not valid.
    """
    into = Path(into) if into is not None else Path(run) / EXPORTS / SET
    learned = load_learned_run(run, label, at_task, objects, base_folder)
    _check_options(learned, into, each, loss, examples)
    model = open_model(learned.model)
    base = published_base(learned.model, base_id, model.auto_class)
    parts = parts and [RENAMED_PARTS.get(part, part) for part in parts]
    updates = _updates(learned, filter_parts(learned, parts, model.parts), each)
    ranks = {adapter: smallest_rank(tasks, loss) for adapter, tasks in updates.items()}
    data = load_examples(learned, examples, data_root)
    stages = _stage_logits(learned, data) if each == "stage" else [None] * len(updates)
    with whole_folder(into) as tmp_dir:
        written, usage = _write_adapters(learned, base, updates, ranks, data, tmp_dir)
        done = AdapterSet(
            folder=into,
            each=each,
            loss=loss,
            members=_reload(written, base, stages, tmp_dir),
            targets=written.targets,
            examples=len(data),
            with_state=with_state,
            **part_choice(learned, parts) | {"picked": _picked(learned, each)},
        )
        if with_state:
            write_state(learned, base, tmp_dir / FOLDER)
        write_json(tmp_dir / RECORD, _manifest(learned, base, done, tmp_dir))
        write_set_card(tmp_dir, name or into.name, learned, base, done, usage)
    return done


def _check_options(learned: LearnedRun, into: Path, each: str, loss: float, examples: int) -> None:
    if each not in EACH:
        raise ConfigError(f"--each is '{each}'", f"choose one of {', '.join(EACH)}")
    if not 0 <= loss < 1:
        raise ConfigError(f"--loss is {loss:g}, but it is a share of an update's norm", "give 0 to below 1")
    check_target(into, examples)
    if each == "stage" or not learned.method.separate_tasks:
        check_mergeable(learned, SET)


def _updates(learned: LearnedRun, deltas: Sequence[Deltas], each: str) -> dict[str, Sequence[Deltas]]:
    """Return adapter's name → the deltas that it sums."""
    return {
        _adapter_name(index, recipe.name): learned.method.combine(deltas[:index])
        if each == "stage"
        else deltas[index - 1 : index]
        for index, recipe in enumerate(learned.recipes[: len(deltas)], 1)
    }


def _picked(learned: LearnedRun, each: str) -> str:
    """Return a sentence on what picks the adapter of an example; empty if their sum is the model."""
    method = learned.method
    if each == "stage" or not method.separate_tasks:
        return ""
    if method.info.task_id_at_test:
        return "Each adapter answers its own task alone; the run was given the task of every example."
    return (
        "Each adapter answers alone; the run's router, which picks one for every example, is not among them."
    )


def _adapter_name(index: int, task: str) -> str:
    """Return the name of a task's adapter; PyTorch's module names hold no dots."""
    return task_folder(index, task).replace(".", "-")


def _stage_logits(learned: LearnedRun, data: TaskData) -> list[Tensor]:
    """Return the logits of the run's own model after every task, in the run's dtype and quantization."""
    logits = []
    for count in range(1, len(learned.deltas) + 1):
        logits.append(probe(replace(learned, deltas=learned.deltas[:count]).load(), data)[1])
        gc.collect()
    return logits


@dataclass(frozen=True)
class _Written:
    """Adapters as they were written, without their tensors.

    Args:
        adapters: adapter's name → rank, error and loss of every layer.
        expected: adapter's name → logits of the base with it, in fp32.
        batch: the inputs of these logits.
        targets: leaf names of all adapted layers.
    """

    adapters: Mapping[str, Combined]
    expected: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    targets: Sequence[str]


def _write_adapters(
    learned: LearnedRun,
    base: Base,
    updates: Mapping[str, Sequence[Deltas]],
    ranks: Mapping[str, int],
    data: TaskData,
    folder: Path,
) -> tuple[_Written, Usage]:
    """Write every adapter to a folder of its name, and take the logits that loading it must give."""
    family = learned.load("float32", [])
    adapters, expected, targets = {}, {}, set()
    batch: dict[str, Tensor] = {}
    for index, (name, tasks) in enumerate(updates.items(), 1):
        combined = combine(tasks, ranks[name], ranks[name])
        write_adapter(folder / name, combined, family.model, family.parts, base)
        record = record_of(learned, "adapter", index) | {"files": hashes(folder / name)}
        write_json(folder / name / RECORD, record)
        batch, expected[name] = _probe_adapted(family, combined, data)
        targets |= {layer.rsplit(".", 1)[-1] for layer in combined.layers}
        # One adapter's tensors at a time are in memory.
        losses = {layer: combined.losses.get(layer, 0.0) for layer in combined.layers}
        adapters[name] = replace(combined, layers={}, losses=losses)
    return _Written(adapters, expected, batch, sorted(targets)), family.usage(data)


def _reload(written: _Written, base: Base, stages: Sequence[Tensor | None], folder: Path) -> list[Member]:
    """Load every adapter in a fresh process, and describe it.

    Args:
        written: the adapters.
        base: their base.
        stages: logits of the run's own model after every task; None for a task's own update.
        folder: the set's folder.
    """
    layers = {name: len(combined.losses) for name, combined in written.adapters.items()}
    reloaded = verify_set(folder, base, written.batch, written.expected, layers)
    return [
        Member(
            name=name,
            task=index,
            rank=combined.rank,
            error=combined.error,
            losses=combined.losses,
            reloaded=Deviation.between(reloaded[name], written.expected[name]),
            own=None if own is None else Deviation.between(reloaded[name], own),
        )
        for index, ((name, combined), own) in enumerate(zip(written.adapters.items(), stages), 1)
    ]


def _probe_adapted(family: Family, combined: Combined, data: TaskData) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and logits of the base with an adapter, which is removed again."""
    inits = {
        layer: AdapterInit(combined.rank, float(combined.rank), delta.A, delta.B)
        for layer, delta in combined.layers.items()
    }
    wrapper = attach(family.model, inits)
    family.model.eval()
    try:
        return probe(family, data)
    finally:
        detach(wrapper)


def _manifest(learned: LearnedRun, base: Base, done: AdapterSet, folder: Path) -> dict[str, Any]:
    """Return the set's record: its base, and rank, losses, scores and hashes of every adapter."""
    tasks = learned.matrix.tasks
    adapters = []
    for member in done.members:
        files = {f"{member.name}/{name}": value for name, value in hashes(folder / member.name).items()}
        entry: dict[str, Any] = {
            "name": member.name,
            "task": tasks[member.task - 1],
            "tasks": tasks[: member.task] if done.each == "stage" else [tasks[member.task - 1]],
            "rank": member.rank,
            "loss": {"all": member.error, "largest": member.worst, "layers": dict(member.losses)},
            "files": files,
        }
        if done.each == "stage":
            entry["scores"] = dict(zip(tasks, learned.matrix.rows[member.task - 1]))
        adapters.append(entry)
    return record_of(learned, SET, len(done.members)) | {
        "base_id": base.id,
        "base_revision": base.revision,
        "each": done.each,
        "allowed_loss": done.loss,
        "max_lora_rank": done.max_rank,
        "target_modules": list(done.targets),
        "adapters": adapters,
        "files": {name: value for entry in adapters for name, value in entry["files"].items()},
    }
