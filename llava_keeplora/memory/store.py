"""Files of a memory: its settings, protected subspaces and updates, in JSON and safetensors alone.

The folder is at the same time a PEFT adapter of the base, with the sum of the updates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_keeplora import __version__
from llava_keeplora.adapters import Delta, FullDelta, load_deltas, save_deltas
from llava_keeplora.errors import MethodError, RunError
from llava_keeplora.export.adapter import combine, write_adapter
from llava_keeplora.export.hub import check_repo_id, download
from llava_keeplora.export.hub import push as upload
from llava_keeplora.export.loaded_run import Base, checked
from llava_keeplora.files import read_tensors, whole_folder, write_bytes, write_json, write_tensors
from llava_keeplora.memory.fingerprint import fingerprint
from llava_keeplora.records import COUNT, Each, mismatches, read_object
from llava_keeplora.run_folder import DELTA, STATE
from llava_keeplora_eval.files import file_hash

#: The file that makes a folder a memory.
RECORD = "keeplora.json"
FORMAT = 1
SCHEMA = {
    "format": COUNT,
    "arguments": {
        "targets": Each({"targets": (str, [str])}),
        "rank": COUNT,
        "seed": COUNT,
    },
    "options": dict,
    "base": {"model": str, "name_or_path": (str, None), "weights": Each(str), "other_weights?": Each(str)},
    "tasks": [{"name": str, "report": dict}],
    "base_report": dict,
    "files": Each(str),
}
AGAIN = "save the memory again, or take another copy"


@dataclass(frozen=True)
class Task:
    """A finished task of a memory.

    Args:
        name: its name.
        deltas: layer name → its update.
        report: the numbers of its A and of its features, as the driver records them.
    """

    name: str
    deltas: Mapping[str, Delta]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """All that a memory consists of in addition to the model.

    Args:
        record: `arguments` and `options` that it was made with, `base` with the model's class, its name and
            the fingerprints of its weights, and `base_report`.
        states: what the base and each task added to the protected subspaces.
        tasks: the finished tasks.
    """

    record: Mapping[str, Any]
    states: list[dict[str, Tensor]]
    tasks: list[Task]

    @property
    def base_name(self) -> str | None:
        """The folder or Hub id that transformers loaded the base from; None for other models."""
        return self.record["base"]["name_or_path"]


def save(contents: Contents, model: nn.Module, folder: Path) -> Path:
    """Write a memory; an existing folder is replaced, but only one that holds a memory or nothing.

    Raises:
        RunError: if the folder holds other files.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise RunError(f"{folder} holds files that are no memory", "give a new or empty folder")
    with whole_folder(folder) as tmp_dir:
        for index, state in enumerate(contents.states):
            if state:
                write_tensors(_place(tmp_dir, index, STATE), state)
        for index, task in enumerate(contents.tasks, 1):
            save_deltas(_place(tmp_dir, index, DELTA), task.deltas)
        _write_adapter(contents, model, tmp_dir)
        write_bytes(tmp_dir / "README.md", _card(contents).encode())
        files = sorted(path for path in tmp_dir.rglob("*.safetensors"))
        record = {
            **contents.record,
            "format": FORMAT,
            "version": __version__,
            "tasks": [{"name": task.name, "report": task.report} for task in contents.tasks],
            "files": {path.relative_to(tmp_dir).as_posix(): file_hash(path) for path in files},
        }
        write_json(tmp_dir / RECORD, record)
    return folder


def load(folder: Path | str) -> Contents:
    """Read what `save` wrote, from a folder or the Hub.

    Raises:
        ConfigError: if there is no such folder and the name is none on the Hub.
        RunError: if the files are damaged, or are no memory.
    """
    with tempfile.TemporaryDirectory() as tmp_dir:
        place = Path(folder) if Path(folder).is_dir() else download(str(folder), None, Path(tmp_dir))
        if not (place / RECORD).is_file():
            raise RunError(f"{folder} holds no {RECORD}", "give a folder that KeepLora.save wrote")
        record = read_object(place / RECORD, AGAIN)
        if record.get("format") != FORMAT:
            raise RunError(
                f"{place / RECORD} has format {record.get('format')!r}, and this version reads {FORMAT}",
                "use the version of llava-keeplora that wrote it",
            )
        for where, why in mismatches(record, SCHEMA):
            raise RunError(f"{place / RECORD} is damaged ({where}: {why})", AGAIN)
        for name, expected in record["files"].items():
            checked(place / name, expected, "KeepLora.save")
        states = [_tensors(place, index, record) for index in range(len(record["tasks"]) + 1)]
        tasks = [_task(place, index, record, facts) for index, facts in enumerate(record["tasks"], 1)]
    return Contents(record, states, tasks)


def _tensors(folder: Path, index: int, record: Mapping[str, Any]) -> dict[str, Tensor]:
    path = _place(folder, index, STATE)
    return read_tensors(path) if _listed(path, folder, record) else {}


def _task(folder: Path, index: int, record: Mapping[str, Any], facts: Mapping[str, Any]) -> Task:
    path = _place(folder, index, DELTA)
    if not _listed(path, folder, record):
        raise RunError(f"{folder / RECORD} lists no update of task '{facts['name']}'", AGAIN)
    deltas = {name: delta for name, delta in load_deltas(path).items() if isinstance(delta, Delta)}
    return Task(facts["name"], deltas, facts["report"])


def check_base(contents: Contents, layers: Mapping[str, nn.Module], others: Mapping[str, str]) -> None:
    """Check that a model has the weights that a memory was made from.

    Args:
        contents: the memory's.
        layers: full name → the model's layer, of those that the memory's targets name.
        others: name → fingerprint of every other parameter of the model.

    Raises:
        MethodError: naming a layer or parameter that differs.
    """
    expected, base = contents.record["base"]["weights"], contents.record["base"]
    if different := sorted(set(expected) ^ set(layers)):
        raise MethodError(
            f"the model's layers differ from the memory's base ({contents.base_name or base['model']}): "
            f"{len(different)} differ, first {different[0]}",
            "load the model that the memory was made from",
        )
    now = {name: fingerprint(layer.weight) for name, layer in layers.items()} | dict(others)
    # Memories of earlier versions recorded the weights of the layers alone.
    for name, value in {**expected, **base.get("other_weights", {})}.items():
        if now.get(name) != value:
            raise MethodError(
                f"the weights of {name} are not those of the base that this memory was made from "
                f"({contents.base_name or base['model']})",
                "load the base itself, in the same dtype, and not a model that the tasks are merged into",
            )


def push(contents: Contents, model: nn.Module, repo_id: str) -> str:
    """Upload a memory to the Hub and return the repository's URL."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as tmp_dir:
        folder = save(contents, model, Path(tmp_dir) / "memory")
        try:
            return upload(folder, repo_id)
        except RunError as error:  # Its cure names the folder, which is temporary here.
            raise RunError(
                error.problem,
                f"write it with memory.save(FOLDER), and push that: `hf upload {repo_id} FOLDER`",
            ) from error


def _place(folder: Path, index: int, name: str) -> Path:
    return folder / f"task-{index:02d}" / name


def _listed(path: Path, folder: Path, record: Mapping[str, Any]) -> bool:
    return path.relative_to(folder).as_posix() in record["files"]


def _write_adapter(contents: Contents, model: nn.Module, folder: Path) -> None:
    """Write the sum of the updates as a PEFT adapter, if a task has changed a layer."""
    changes: list[dict[str, Delta | FullDelta]] = [
        {name: delta for name, delta in task.deltas.items() if bool(delta.B.any())} for task in contents.tasks
    ]
    if any(changes):
        base = Base(contents.base_name or "", None, None)
        write_adapter(folder, combine(changes), model, {}, base)


def _card(contents: Contents) -> str:
    """Return a model card: what the memory holds and the lines that load it."""
    kind = contents.record["base"]["model"]
    base = contents.base_name or kind
    tasks = "\n".join(f"{index}. {task.name}" for index, task in enumerate(contents.tasks, 1)) or "none yet"
    header = f"base_model: {base}\n" if contents.base_name else ""
    return f"""---
library_name: peft
{header}tags:
- keeplora
- continual-learning
---

# What a {kind} has learned, and the subspaces that protect it

The folder is a PEFT adapter of `{base}` (`PeftModel.from_pretrained(base, folder)`), and a memory of
[KeepLoRA](https://arxiv.org/abs/2601.19659), with which the next task is learned:

```python
from llava_keeplora import KeepLora

memory = KeepLora.load(model, folder)  # the base; its weights become those after the last task
model = memory.begin_task(batches)
```

Tasks:

{tasks}
"""
