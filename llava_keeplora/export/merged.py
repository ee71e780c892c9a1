"""One checkpoint out of base and deltas.

What a quantised base cannot take up is merged once, into an unquantised copy.

Rounding to a dtype with p bits of significand moves a weight by up to 2⁻ᵖ of itself, and of an update that is
small beside its weight a large share is lost. With cast(·) the rounding, W₀ the base and Δ the sum of the
updates, the exported model differs from the base in that dtype by cast(W₀ + Δ) − cast(W₀); what is lost is
‖cast(W₀ + Δ) − cast(W₀) − Δ‖ / ‖Δ‖ (Frobenius norms over all changed layers). Above 1 the rounding is larger
than the update.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from llava_keeplora.adapters import BaseWeights, Delta, FullDelta
from llava_keeplora.export.loaded_run import LearnedRun
from llava_keeplora.models import DTYPES, Family

#: Of one file; the Hub, and machines with little memory, like several better than one huge one.
SHARD = "5GB"
#: Training changes nothing of a processor, so its files go along as they are, in whatever format the base has
#: them.
PROCESSOR = (
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class Rounding:
    """What rounding to the checkpoint's dtype loses of the updates, relative to their norm (see the module).

    Args:
        dtype: of the checkpoint, a key of `DTYPES`.
        base: of the base's own checkpoint.
        lost: over all changed layers.
        parts: the same of each part.
    """

    dtype: str
    base: str
    lost: float
    parts: Mapping[str, float]

    def describe(self) -> str:
        """What a person reads."""
        cast = "which the base has too" if self.dtype == self.base else f"where the base has {self.base}"
        own = ", ".join(f"{part} {_percent(share)}" for part, share in self.parts.items())
        return f"in {self.dtype}, {cast}: rounding loses {_percent(self.lost)} of the updates' norm ({own})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def own_dtype(family: Family, otherwise: str) -> str:
    """The dtype of a base's own checkpoint.

    `otherwise` where its configuration names none, or one that nothing here computes in.
    """
    # Both families have the `transformers` configuration; a plug-in's may have none.
    config = getattr(family, "config", None)
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return named if named in DTYPES else otherwise


def merge(learned: LearnedRun, dtype: str | None) -> tuple[Family, Rounding]:
    """The base with what the tasks learned, W₀ + Σ ΔW summed in fp32 and rounded once.

    Args:
        learned: the tasks.
        dtype: of the checkpoint; the base's own when None.

    Returns:
        the model, its parameters in that dtype, and what the rounding loses.
    """
    family = learned.load("float32", [])
    base = own_dtype(family, learned.model.dtype)
    dtype = dtype or base
    sums: dict[str, list[float]] = {part: [0.0, 0.0] for part in family.parts}
    for name in dict.fromkeys(name for task in learned.deltas for name in task):
        part = next(
            (part for part, prefix in family.parts.items() if name.startswith(prefix + ".")), "the rest"
        )
        for index, square in enumerate(
            _merge_layer(
                family.model.get_submodule(name),
                [task[name] for task in learned.deltas if name in task],
                DTYPES[dtype],
            )
        ):
            sums.setdefault(part, [0.0, 0.0])[index] += square
    # Buffers stay: a model that is loaded in that dtype computes its rotary angles in fp32 all the same.
    for parameter in family.model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    parts = {part: math.sqrt(error / norm) for part, (error, norm) in sums.items() if norm}
    error, norm = (sum(column) for column in zip(*sums.values()))
    return family, Rounding(dtype, base, math.sqrt(error / norm) if norm else 0.0, parts)


def _merge_layer(
    module: nn.Module, deltas: Sequence[Delta | FullDelta], dtype: torch.dtype
) -> tuple[float, float]:
    """Add deltas to a module in fp32; ‖lost‖² and ‖Δ‖² of its parameters."""
    before = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    BaseWeights({"": module}).apply([{"": delta} for delta in deltas])
    error = norm = 0.0
    changes = [delta.changes() for delta in deltas]
    for name in {name for change in changes for name in change}:
        update = sum(change[name].double() for change in changes if name in change)
        kept = module.get_parameter(name).to(dtype).double() - before[name].to(dtype).double()
        error += float((kept - update).square().sum())
        norm += float(update.square().sum())
    return error, norm


def write_merged(folder: Path, family: Family) -> None:
    """Write an ordinary checkpoint with its processor.

    Args:
        folder: where to.
        family: what `merge` gives.
    """
    family.model.save_pretrained(folder, max_shard_size=SHARD)
    path = Path(family.path)
    base = (
        path
        if path.is_dir()
        else Path(snapshot_download(family.path, revision=family.revision, allow_patterns=list(PROCESSOR)))
    )
    for file in {file for pattern in PROCESSOR for file in base.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
