"""A PEFT adapter with KeepLoRA's A for a task that another trainer is to train.

B starts at zero on the untouched weight W. Training B there is the training of KeepLoRA's B from B₀ on
W' = W − s(A B₀)ᵀ, step for step (see `methods/keeplora.py`), so W' need not be written.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from llava_keeplora.adapters import AdapterInit, BaseWeights
from llava_keeplora.config import RunConfig
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.merged import merge, write_merged
from llava_keeplora.export.run_export import check_mergeable, record_of
from llava_keeplora.export.state import RECORD
from llava_keeplora.files import whole_folder, write_bytes, write_json, write_tensors
from llava_keeplora.journal import open_stages
from llava_keeplora.records import read_object
from llava_keeplora.run_folder import EXPORTS, Stage
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora.sequence.method_run import MethodRun
from llava_keeplora.sequence.passes import task_context
from llava_keeplora.sequence.progress import Progress
from llava_keeplora.sequence.runner import opened
from llava_keeplora.sequence.stages import STAGES
from llava_keeplora.sequence.workspace import Workspace


@dataclass(frozen=True)
class StartAdapter:
    """Description of a start adapter.

    Args:
        folder: where it is.
        base: the model that it is trained on.
        layers: number of its layers.
    """

    folder: Path
    base: str
    layers: int


def write_start_adapter(config: RunConfig, into: str | Path, label: str | None = None) -> StartAdapter:
    """Write the adapter from which the last task of a configuration is to be trained.

    Args:
        config: a new run in a temporary folder, or a run with one more task, of which nothing is written.
        into: a new or empty folder.
        label: the method's label; None if there is one method.

    Raises:
        RunError: an earlier task is not finished.
        ConfigError: the method has no A of its own, the run has that task, or the folder is in use.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(
            f"{into} exists already and is not an empty folder", "choose another one with --into"
        )
    labels = list(config.methods)
    if label not in labels and (label or len(labels) > 1):
        raise ConfigError(
            f"there is no method '{label}'" if label else f"the run has {len(labels)} methods",
            f"choose one with --method: {', '.join(labels)}",
        )
    with opened(Workspace(config)) as context:
        state = MethodRun(context, config.methods[label or labels[0]])
        index = state.count
        if index in {entry.task for entry in state.journal.entries}:
            raise ConfigError(
                f"{state.folder} has begun or learned the task '{state.name(index)}' already",
                "name the next task with --task, or fork the run before that one",
            )
        context.base = BaseWeights(state.modules())
        with Progress(state.cost_left(), show=True) as context.progress:
            inits = _inits(state, index)
    merged = _merged(config, state.config.label, index - 1, into) if index > 1 else None
    with whole_folder(into) as folder:
        base = str(merged) if merged else config.model.name_or_path
        if merged == into.absolute() / BASE_FOLDER:
            _write_base(folder / BASE_FOLDER, config, state.config.label, index - 1)
        _write(folder, state, inits, base)
        note = _note(config, state.name(index), base, into, len(inits))
        write_bytes(folder / "README.md", note.encode())
    return StartAdapter(into, base, len(inits))


def _merged(config: RunConfig, label: str, tasks: int, into: Path) -> Path:
    """Return the folder of the checkpoint with what a run knows: the run's export of it, or a new one."""
    exported = Path(config.output_dir).absolute() / EXPORTS / MERGED
    record = read_object(exported / RECORD) if (exported / RECORD).is_file() else {}
    same = all(record.get(key) == value for key, value in {"label": label, "tasks": tasks}.items())
    return exported if same else into.absolute() / BASE_FOLDER


def _write_base(folder: Path, config: RunConfig, label: str, tasks: int) -> None:
    """Write the base with a run's updates, and the record by which `adopt` recognises the base."""
    learned = load_learned_run(config.output_dir, label, tasks)
    check_mergeable(learned, MERGED)
    family, _ = merge(learned, None)
    write_merged(folder, family)
    write_json(folder / RECORD, record_of(learned, MERGED, tasks))


def _inits(state: MethodRun, index: int) -> dict[str, AdapterInit]:
    """Return what the driver's stage PREPARED would give the task's adapters."""
    if index == 1:
        STAGES[Stage.CONSOLIDATED](state, 0)
    earlier = open_stages(state.journal.entries, len(state.context.tasks) - 1, guarded=state.guarded)
    missing = [key for key in earlier if index > 1]
    if missing:
        raise RunError(
            f"{state.folder} has not finished stage {missing[0][1]} of task {missing[0][0]}",
            "let the run go on to its end first",
        )
    seed = stage_seed(state.context.config.seed, index, Stage.PREPARED)
    set_seed(seed)
    state.begin(index)
    inits = state.method.init_adapters(task_context(state, index, Stage.PREPARED))
    if not inits or any(init.A is None or init.train_A or not init.train_B for init in inits.values()):
        raise ConfigError(
            f"'{state.config.label}' does not train B alone, so that there is nothing to start from",
            "choose keeplora with --method",
        )
    return inits


def _write(folder: Path, state: MethodRun, inits: Mapping[str, AdapterInit], base: str) -> None:
    """Write the adapter as PEFT does, with B = 0."""
    from peft import LoraConfig

    first = next(iter(inits.values()))
    LoraConfig(
        base_model_name_or_path=base,
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=sorted(inits),
        rank_pattern={name: init.rank for name, init in inits.items() if init.rank != first.rank},
        alpha_pattern={name: init.alpha for name, init in inits.items() if init.alpha != first.alpha},
    ).save_pretrained(folder)
    zeros = {
        name: torch.zeros(state.layers[name].module.out_features, init.rank) for name, init in inits.items()
    }
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": value
        for factor, values in (("A", {n: init.A for n, init in inits.items()}), ("B", zeros))
        for name, value in values.items()
        if value is not None
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


#: Form of an export, and folder in a start adapter's, of the checkpoint that it is trained on.
MERGED, BASE_FOLDER = "merged", "base"

NOTE = """# An adapter to train task `{task}` from

A plain PEFT LoRA on {layers} layers of `{base}`. Its A is KeepLoRA's: directions of the task's first-step
gradient outside of what is protected. Its B is zero, so the model answers as its base until it is trained.

**Train `lora_B` alone: freeze every `lora_A`**, and nothing else of the model is trained (no bias, no
`modules_to_save`, no DoRA). In Python, after it is loaded and after anything that calls `set_adapter`:

```python
model = PeftModel.from_pretrained(base, "{folder}", is_trainable=True)
for name, parameter in model.named_parameters():
    if "lora_A" in name:
        parameter.requires_grad_(False)
```

A trainer that cannot freeze A may train it too: what that moves into the protected subspace is taken away
afterwards, and how much it is is printed.

{begin}When it is trained:

```bash
{end}
```
"""


def _note(config: RunConfig, task: str, base: str, folder: Path, layers: int) -> str:
    """Return the README of a start adapter: what to freeze, on which model, and how to take it back."""
    run, name = shlex.quote(config.output_dir), shlex.quote(config.tasks[-1])
    if len(config.tasks) == 1:
        begin, end = "", f"llava-keeplora import TRAINED --task {name} --into RUN"
    else:
        begin = f"It is trained on `{base}`, which holds what the run knows.\n\n"
        end = f"llava-keeplora adopt TRAINED --task {name} --into {run}"
    return NOTE.format(task=task, layers=layers, base=base, folder=folder, begin=begin, end=end)
