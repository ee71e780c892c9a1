"""Verification of an export: its logits, loaded in a fresh process (`verify_worker.py`), are compared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llava_keeplora.errors import RunError
from llava_keeplora.export.loaded_run import Base
from llava_keeplora.files import write_json, write_tensors
from llava_keeplora.models import Family, Prepared
from llava_keeplora_recipes import TaskData

#: Allowed difference of fp32 logits; relative to the largest logit where that is above 1 (CLIP's are cosines
#: times up to 100).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Deviation:
    """Difference between two models' logits.

    Args:
        largest: the largest |difference| of a logit.
        relative: ‖difference‖ / ‖expected logits‖.
        same: share of the positions with the same best token or class.
    """

    largest: float
    relative: float
    same: float

    @classmethod
    def between(cls, logits: Tensor, expected: Tensor) -> "Deviation":
        """Return the deviation of logits (positions, choices) from expected ones of the same shape."""
        difference = logits.float() - expected.float()
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        return cls(
            float(difference.abs().max()), float(difference.norm() / expected.float().norm()), float(same)
        )


@torch.no_grad()
def probe(family: Family, data: TaskData) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's inputs for some examples, and its logits in fp32.

    Logits are (answer tokens, vocabulary) or (images, classes), computed as in training.

    Args:
        family: the model.
        data: the examples.
    """
    batch = family.inputs(data, Prepared(family, data)).collate(range(len(data)))
    task = family.task(data.recipe)
    device = next(family.model.parameters()).device
    logits = task(**{key: value.to(device) for key, value in batch.items()})["logits"]
    return {**batch, **dict(task.named_buffers(recurse=False))}, logits.float().cpu()


def verify_export(
    folder: Path,
    form: str,
    base: Base,
    batch: Mapping[str, Tensor],
    expected: Tensor,
    layers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Load an export in a fresh process and compare its logits.

    Args:
        folder: the export.
        form: `adapter`, `merged` or `state`.
        base: the base of an adapter or a state.
        batch, expected: inputs and fp32 logits of the model that was to be written, see `probe`.
        layers: how many layers an adapter must have.

    Returns:
        the export's logits in fp32, and in bfloat16.

    Raises:
        RunError: it cannot be loaded, has another number of adapted layers, or gives other logits.
    """
    loaded, counts = _reload(folder, form, base, batch)
    for count in counts.values():
        _check_layers(count, layers)
    for way, logits in loaded.items():
        if way != "bfloat16":
            _check_logits(f"the {form}", way, logits, expected)
    return loaded["float32"], loaded["bfloat16"]


def verify_set(
    folder: Path,
    base: Base,
    batch: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    layers: Mapping[str, int],
) -> dict[str, Tensor]:
    """Load the base once in a fresh process, switch between a set's adapters, and compare the logits of each.

    Args:
        folder: the set; every adapter has a folder of its name.
        base: the adapters' base.
        batch: inputs, see `probe`.
        expected: adapter's name → fp32 logits of the model that it was to give.
        layers: adapter's name → how many layers it must have.

    Returns:
        adapter's name → its logits in fp32.

    Raises:
        RunError: one cannot be loaded, has another number of adapted layers, or gives other logits.
    """
    loaded, counts = _reload(folder, "set", base, batch, list(expected))
    for name, logits in expected.items():
        _check_layers(counts[name], layers[name])
        _check_logits("the set", f"adapter '{name}'", loaded[name], logits)
    return loaded


def _reload(
    folder: Path, form: str, base: Base, batch: Mapping[str, Tensor], adapters: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return logits and number of adapted layers by way of loading, as a fresh process finds them."""
    with _where_base_is_named(base) as tmp_dir:
        write_tensors(tmp_dir / "batch.safetensors", batch)
        job: dict[str, Any] = {
            "folder": str(folder.resolve()),
            "form": form,
            "base": base.id,
            "revision": base.revision,
            "adapters": list(adapters),
        }
        job |= {"auto_class": base.auto_class, "opened_by": base.opened_by, "method": base.method}
        write_json(tmp_dir / "job.json", job)
        reason = verify_in_fresh_process(tmp_dir)
        if reason:
            raise RunError(f"the {form} cannot be loaded again ({reason})", "mend that and export again")
        return load_file(tmp_dir / "logits.safetensors"), json.loads((tmp_dir / "layers.json").read_text())


def _check_layers(count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        raise RunError(
            f"{count} layers are adapted after loading, where {expected} were written",
            "check the names of the base's layers; nothing was exported",
        )


def _check_logits(what: str, way: str, logits: Tensor, expected: Tensor) -> None:
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    largest = Deviation.between(logits, expected).largest
    if not largest <= limit:
        raise RunError(
            f"{what} gives other logits after loading ({way}: {largest:.2g} off, where {limit:.2g} "
            "is rounding)",
            "check that the base is the one that the run was trained on; nothing was exported",
        )


def verify_in_fresh_process(tmp_dir: Path) -> str | None:
    """Run `verify_worker.py` in a folder, and return the last line of its error; None if it succeeds."""
    done = subprocess.run(
        [sys.executable, "-m", "llava_keeplora.export.verify_worker"],
        cwd=tmp_dir,
        capture_output=True,
        text=True,
    )
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


@contextmanager
def _where_base_is_named(base: Base) -> Iterator[Path]:
    """Yield a temporary working folder, in which a base from a local folder is found by its id on the Hub."""
    with tempfile.TemporaryDirectory() as name:
        tmp_dir = Path(name)
        if base.local is not None:
            (tmp_dir / base.id).parent.mkdir(parents=True)
            (tmp_dir / base.id).symlink_to(base.local, target_is_directory=True)
        yield tmp_dir
