"""Export of base and deltas as one merged checkpoint.

The deltas of a quantised base are merged into an unquantised copy.

Rounding to a dtype with p bits of significand moves a weight by up to 2⁻ᵖ of itself, so a large share of an
update that is small relative to its weight is lost. With cast(·) the rounding, W₀ the base and Δ the sum of
the updates, the exported model differs from the base in that dtype by cast(W₀ + Δ) − cast(W₀), and the share
‖cast(W₀ + Δ) − cast(W₀) − Δ‖ / ‖Δ‖ is lost (Frobenius norms over all changed layers). Above 1 the rounding is
larger than the update.
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
from llava_keeplora.models.layouts import part_of

#: Largest size of one file: several smaller files are easier on the Hub and on machines with little memory.
SHARD = "5GB"
#: Files of a processor, which are copied from the base because training does not change them.
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
    """Share of the updates' norm that rounding to the checkpoint's dtype loses (see the module's docstring).

    Args:
        dtype: the checkpoint's dtype, a key of `DTYPES`.
        base: the dtype of the base's own checkpoint.
        lost: the share over all changed layers.
        parts: part → the share over its layers.
    """

    dtype: str
    base: str
    lost: float
    parts: Mapping[str, float]

    def describe(self) -> str:
        """Return the shares as a sentence."""
        cast = "which the base has too" if self.dtype == self.base else f"where the base has {self.base}"
        parts = ", ".join(f"{part} {_percent(share)}" for part, share in self.parts.items())
        return f"in {self.dtype}, {cast}: rounding loses {_percent(self.lost)} of the updates' norm ({parts})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def own_dtype(family: Family, otherwise: str) -> str:
    """Return the dtype of a base's own checkpoint, a key of `DTYPES`.

    Args:
        family: the base.
        otherwise: the result if its configuration names no dtype, or none of `DTYPES`.
    """
    # Both families have the `transformers` configuration; a plug-in's may have none.
    config = getattr(family, "config", None)
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return named if named in DTYPES else otherwise


def merge(learned: LearnedRun, dtype: str | None) -> tuple[Family, Rounding]:
    """Merge the tasks' deltas into the base: W₀ + Σ ΔW, summed in fp32 and rounded once.

    Args:
        learned: the run up to the exported task.
        dtype: the checkpoint's dtype, a key of `DTYPES`; the base's own when None.

    Returns:
        the model, its parameters in that dtype, and what the rounding loses.
    """
    family = learned.load("float32", [])
    base = own_dtype(family, learned.model.dtype)
    dtype = dtype or base
    sums: dict[str, list[float]] = {part: [0.0, 0.0] for part in family.parts}
    updates = learned.method.combine(learned.deltas)
    for name in dict.fromkeys(name for task in updates for name in task):
        part = part_of(name, family.parts) or "the rest"
        for index, square in enumerate(
            _merge_layer(
                family.model.get_submodule(name),
                [task[name] for task in updates if name in task],
                DTYPES[dtype],
            )
        ):
            sums.setdefault(part, [0.0, 0.0])[index] += square
    # Buffers keep their dtype: a model that is loaded in half precision has rotary frequencies in fp32, too.
    for parameter in family.model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    parts = {part: math.sqrt(error / norm) for part, (error, norm) in sums.items() if norm}
    error, norm = (sum(column) for column in zip(*sums.values()))
    return family, Rounding(dtype, base, math.sqrt(error / norm) if norm else 0.0, parts)


def _merge_layer(
    module: nn.Module, deltas: Sequence[Delta | FullDelta], dtype: torch.dtype
) -> tuple[float, float]:
    """Add deltas to a module in fp32, and return ‖lost‖² and ‖Δ‖² of its parameters (Frobenius norms)."""
    before = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    BaseWeights({"": module}).apply([{"": delta} for delta in deltas])
    error = norm = 0.0
    changes = [delta.changes() for delta in deltas]
    for name in {name for change in changes for name in change}:
        update = sum(change[name].double() for change in changes if name in change)
        rounded = module.get_parameter(name).to(dtype).double() - before[name].to(dtype).double()
        error += float((rounded - update).square().sum())
        norm += float(update.square().sum())
    return error, norm


def write_merged(folder: Path, family: Family) -> None:
    """Write an ordinary checkpoint with its processor.

    Args:
        folder: the folder to write to.
        family: the merged model, see `merge`.
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
