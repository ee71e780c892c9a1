"""An export from beginning to end.

The run is read, the export is written to a temporary folder, loaded again in a fresh process and compared,
described in a model card, and moved to its place.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import llava_keeplora
from llava_keeplora.adapters import Deltas
from llava_keeplora.config import EXPORT_EXAMPLES
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.adapter import Combined, combine, write_adapter
from llava_keeplora.export.card import write_card
from llava_keeplora.export.exported import FORMS, Exported
from llava_keeplora.export.loaded_run import Base, LearnedRun, filter_parts, load_learned_run, published_base
from llava_keeplora.export.merged import merge, write_merged
from llava_keeplora.export.state import FOLDER, RECORD, SUFFIXES, write_state
from llava_keeplora.export.verify import Deviation, probe, verify_export
from llava_keeplora.files import whole_folder, write_json
from llava_keeplora.models import DTYPES, Family, open_model
from llava_keeplora.objects import Objects
from llava_keeplora.run_folder import BASE, EXPORTS, RENAMED_PARTS
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes import TaskData, load_split


def export_run(
    run: str | Path,
    form: str,
    into: str | Path | None = None,
    *,
    label: str | None = None,
    at_task: int | None = None,
    parts: Sequence[str] | None = None,
    rank: int | None = None,
    with_state: bool = True,
    base_id: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    examples: int = EXPORT_EXAMPLES,
    data_root: str | None = None,
    objects: Objects = Objects(),
    base_folder: str | None = None,
) -> Exported:
    """Export what a run learned, compare its logits, and write a model card.

    Args:
        run: the run folder.
        form: `adapter`, `merged` or `state`.
        into: a new or empty folder, or an earlier export's; RUN/export/FORM when None.
        label: the method's label; None if the run has one method.
        at_task: the last task, counted from 1; the last finished one when None.
        parts: parts of the model that an adapter changes; all when None.
        rank: the rank that an adapter is compressed to; exact when None.
        with_state: whether an adapter's folder also gets the state that `import` needs.
        base_id: `user/name` or `user/name@revision`, for a base that the run loaded from a folder.
        name: the name under which the export will be published, for the card; the folder's when None.
        dtype: the dtype of a merged checkpoint, a key of `DTYPES`; the base's own when None.
        examples: number of examples of the last task's test split to compare logits on.
        data_root: the folder with the data sets; the run's own when None.
        objects: what the calling program gives instead of files.
        base_folder: `base` of `load_learned_run`.

    Raises:
        RunError: a task is not finished, a file is damaged, or the export gives other logits after loading.
        ConfigError: the form cannot hold what was learned, the target is in use, or options don't match.
    """
    into = Path(into) if into is not None else Path(run) / EXPORTS / form
    learned = load_learned_run(run, label, at_task, objects, base_folder)
    _check_options(form, into, parts, rank, dtype, examples)
    check_mergeable(learned, form)
    model = open_model(learned.model)
    method = learned.config["methods"][learned.label]["method"]
    base = replace(published_base(learned.model, base_id, model.auto_class), method=method)
    parts = parts and [RENAMED_PARTS.get(part, part) for part in parts]
    deltas = learned.method.combine(filter_parts(learned, parts, model.parts))
    combined = combine(deltas, rank) if form == "adapter" else None
    # Missing data are noticed before any weight is loaded.
    data = load_examples(learned, examples, data_root)
    _, run_logits = probe(learned.load(), data)
    gc.collect()
    job = _Job(
        learned, base, form, into, deltas, combined, rank, with_state, name or into.name, dtype, parts, data
    )
    with whole_folder(into) as tmp_dir:
        return _write_export(job, run_logits, tmp_dir)


@dataclass(frozen=True)
class _Job:
    """Arguments of `export_run`, checked and resolved."""

    learned: LearnedRun
    base: Base
    form: str
    into: Path
    deltas: Sequence[Deltas]
    combined: Combined | None
    rank: int | None
    with_state: bool
    name: str
    dtype: str | None
    parts: Sequence[str] | None
    data: TaskData


def _write_export(job: _Job, run_logits: Tensor, tmp_dir: Path) -> Exported:
    """Write an export's files, compare its logits with the run's, and describe it."""
    learned, combined = job.learned, job.combined
    if job.form == "merged":
        family, rounding = merge(learned, job.dtype)
        write_merged(tmp_dir, family)
        family.model.float()
    else:
        rounding, family = None, _write_updates(job, tmp_dir)
    batch, expected = probe(family, job.data)
    usage = family.usage(job.data)
    del family
    gc.collect()
    layers = len(combined.layers) if combined else None
    float32, bfloat16 = verify_export(tmp_dir, job.form, job.base, batch, expected, layers)
    if combined and job.with_state:
        write_state(learned, job.base, tmp_dir / FOLDER)
    exported = Exported(
        folder=job.into,
        form=job.form,
        tasks=len(learned.deltas),
        adapter=combined,
        compressed=job.rank is not None,
        with_state=combined is not None and job.with_state,
        examples=len(job.data),
        reloaded=Deviation.between(float32, expected),
        own=Deviation.between(float32, run_logits),
        bfloat16=Deviation.between(bfloat16, run_logits),
        rounding=rounding,
        **part_choice(learned, job.parts),
    )
    write_json(tmp_dir / RECORD, _record(learned, exported, tmp_dir))
    write_card(tmp_dir, job.name, learned, job.base, exported, usage)
    return exported


def _write_updates(job: _Job, folder: Path) -> Family:
    """Write an adapter or a state, and return the model that loading it must give."""
    family = job.learned.load("float32", [job.combined.layers] if job.combined and job.rank else job.deltas)
    if job.combined:
        write_adapter(folder, job.combined, family.model, family.parts, job.base)
    else:
        write_state(job.learned, job.base, folder)
    return family


def part_choice(learned: LearnedRun, parts: Sequence[str] | None) -> dict[str, Any]:
    """Return the trained parts that an export leaves out, and whether it holds the language model alone."""
    trained = list(learned.config["methods"][learned.label]["parts"])
    exported = list(parts or trained)
    left_out = [part for part in trained if part not in exported]
    return {"left_out": left_out, "language_only": exported == ["language"]}


def check_mergeable(learned: LearnedRun, form: str) -> None:
    """Refuse a form that needs a sum of weights, for a method that has none.

    Raises:
        ConfigError: what the method learned does not merge into the base.
    """
    if form != "state" and not learned.method.mergeable:
        alone = (
            "--as set --each task, one adapter for every task, or " if learned.method.separate_tasks else ""
        )
        raise ConfigError(
            f"what '{learned.label}' learned does not merge into the base's weights",
            f"export {alone}--as state",
        )


def load_examples(learned: LearnedRun, examples: int, data_root: str | None) -> TaskData:
    """Load the first examples of the last task's test split."""
    recipe, settings = learned.recipes[len(learned.deltas) - 1], learned.config["data"]
    data = load_split(recipe, "test", data_root or settings["root"], settings["on_bad_image"])
    return data.take(range(min(examples, len(data))))


def _record(learned: LearnedRun, exported: Exported, folder: Path) -> dict[str, Any]:
    """Return what `export.json` says of the files in a folder."""
    # A state has a list of its own.
    files = {} if exported.form == "state" else hashes(folder)
    rounding = {"rounding": asdict(exported.rounding)} if exported.rounding else {}
    return record_of(learned, exported.form, exported.tasks) | {"files": files} | rounding


def record_of(learned: LearnedRun, form: str, tasks: int) -> dict[str, Any]:
    """Return what `export.json` says of every form: the run's label, its base by content, and this version.

    Args:
        learned: the run up to the exported task.
        form: the export's form.
        tasks: number of tasks that it has learned.
    """
    record = {"form": form, "label": learned.label, "tasks": tasks, "version": llava_keeplora.__version__}
    # By content, so that `predict` with the adapter can refuse another base.
    content = learned.base_record()
    return record | ({BASE: content} if content else {})


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of tensors or records directly in a folder, by name."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*")) if path.suffix in SUFFIXES}


def _check_options(
    form: str, into: Path, parts: Sequence[str] | None, rank: int | None, dtype: str | None, examples: int
) -> None:
    if form not in FORMS:
        raise ConfigError(f"the form is '{form}'", f"choose one of {', '.join(FORMS)}")
    if form != "adapter" and (parts or rank is not None):
        raise ConfigError(
            f"--parts and --rank shape an adapter, and the form is '{form}'",
            "leave them out, or export --as adapter",
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"the dtype is '{dtype}'", f"choose one of {', '.join(DTYPES)}")
    check_target(into, examples)


def check_target(into: Path, examples: int) -> None:
    """Refuse a folder in use, and a comparison on nothing.

    Raises:
        ConfigError: the folder has files and is no export, or there are no examples.
    """
    if examples < 1:
        raise ConfigError(f"--examples is {examples}, but logits are compared on something", "give 1 or more")
    if into.exists() and (not into.is_dir() or (any(into.iterdir()) and not (into / RECORD).is_file())):
        raise ConfigError(
            f"{into} is there already and not an empty folder", "choose another one with --into"
        )
