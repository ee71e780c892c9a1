"""One checkpoint out of base and deltas: what a quantised base cannot take up is merged once, into an unquantised copy."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import BaseWeights, Delta, FullDelta, load_deltas
from llava_keeplora.config import ModelConfig, read_dumped
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.files import file_hash
from llava_keeplora.journal import Journal
from llava_keeplora.models import DTYPES, Family, Prepared, load_model
from llava_keeplora_recipes import TaskData, load_recipe


@dataclass(frozen=True)
class Deviation:
    """How far a merged model's logits are from those of the model that the run trained and scored.

    Args:
        tasks: merged.
        examples: compared.
        largest: |difference| of a logit.
        relative: ‖difference‖ / ‖logits‖.
        same: share of the positions with the same best token or class.
    """

    tasks: int
    examples: int
    largest: float
    relative: float
    same: float


def export_merged(
    run: str | Path, into: str | Path, *, label: str | None = None, dtype: str = "bfloat16", examples: int = 8, data_root: str | None = None
) -> Deviation:
    """Write base + Σ deltas as an ordinary checkpoint with its processor, and compare its logits with the run's own model.

    The base is loaded unquantised, W_0 + Σ s_i B_i A_i is summed in fp32 and rounded to the dtype once. The run's own model is
    the base in the form that it was trained in, with the deltas as they were.

    Args:
        run: the run folder.
        into: a new or empty folder.
        label: the method; the only one of the run where it is left out.
        dtype: of the checkpoint, a key of `DTYPES`.
        examples: of the last task's test split, to compare on.
        data_root: the folder with the data sets; the run's own when None.

    Raises:
        RunError: for a folder that is no run, a method that it doesn't have or that has learned nothing, or damaged deltas.
        ConfigError: for an unknown dtype, a target folder that is not empty, or a model that cannot be loaded.
    """
    run, into = Path(run), Path(into)
    config = read_dumped(run)
    label = _chosen(config, run, label)
    if dtype not in DTYPES:
        raise ConfigError(f"the dtype is '{dtype}'", f"choose one of {', '.join(DTYPES)}")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"{into} is there already and not an empty folder", "choose another one with --into")
    deltas = _trained_deltas(run / label)
    source, limit = ModelConfig(**config["model"]), config["evaluation"]["max_new_tokens"]

    # First what can go wrong for want of data; the model of the run in its own form.
    data = load_recipe(config["tasks"][len(deltas) - 1]).load("test", data_root or config["data"]["root"], config["data"]["on_bad_image"])
    chosen = range(min(examples, len(data)))
    own = _logits(_with_deltas(load_model(source, limit), deltas), data, chosen)

    family = _with_deltas(load_model(replace(source, dtype=dtype, quantization=None), limit), deltas)
    family.model.save_pretrained(into)
    family.processor.save_pretrained(into)
    del family
    gc.collect()
    # What was written, not what was held in memory.
    merged = _logits(load_model(replace(source, name_or_path=str(into.resolve()), revision=None, dtype=dtype, quantization=None), limit), data, chosen)
    difference = merged - own
    return Deviation(
        tasks=len(deltas),
        examples=len(chosen),
        largest=float(difference.abs().max()),
        relative=float(difference.norm() / own.norm()),
        same=float((merged.argmax(-1) == own.argmax(-1)).float().mean()),
    )


def _chosen(config: dict[str, Any], run: Path, label: str | None) -> str:
    labels = list(config["methods"])
    if label is None and len(labels) == 1:
        return labels[0]
    if label not in labels:
        what = f"has no method '{label}'" if label else f"has {len(labels)} methods"
        raise RunError(f"{run} {what}", f"choose one with --method: {', '.join(labels)}")
    return label


def _trained_deltas(folder: Path) -> list[dict[str, Delta | FullDelta]]:
    """The deltas of every task that the journal has as trained and protected, in order, each checked by its hash."""
    entries = Journal(folder / "journal.jsonl").entries
    closed = {entry.task for entry in entries if entry.stage == "CLOSED"}
    found = []
    for entry in entries:
        if entry.stage != "TRAINED" or entry.task not in closed:
            continue
        name, expected = next((name, value) for name, value in entry.files.items() if name.endswith("delta.safetensors"))
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            raise RunError(f"{path} is not what task {entry.task} wrote", "restore it")
        found.append(load_deltas(path))
    if not found:
        raise RunError(f"{folder} holds no finished task", "run its training first")
    return found


def _with_deltas(family: Family, deltas: Sequence[dict[str, Delta | FullDelta]]) -> Family:
    names = dict.fromkeys(name for task in deltas for name in task)
    layers: dict[str, nn.Linear] = {name: family.model.get_submodule(name) for name in names}
    BaseWeights(layers).apply(deltas)
    return family


@torch.no_grad()
def _logits(family: Family, data: TaskData, chosen: Sequence[int]) -> Tensor:
    """(answer tokens, vocabulary), or (images, classes), in fp32."""
    examples = data.take(chosen)
    batch = family.inputs(examples, Prepared(family, examples)).collate(range(len(chosen)))
    device = next(family.model.parameters()).device
    return family.task(data.recipe)(**{key: value.to(device) for key, value in batch.items()})["logits"].float().cpu()
