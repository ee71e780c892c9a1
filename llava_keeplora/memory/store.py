"""Files of a memory: its settings, protected subspaces and updates, in JSON and safetensors alone.

The folder is at the same time a PEFT adapter of the base, with the sum of the updates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

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

if TYPE_CHECKING:
    from llava_keeplora.memory.keeplora import KeepLora

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
    "base": {"model": str, "name_or_path": (str, None), "weights": Each(str)},
    "tasks": [{"name": str, "report": dict}],
    "base_report": dict,
    "files": Each(str),
}
AGAIN = "save the memory again, or take another copy"

Loaded = tuple[dict[str, Any], list[dict[str, Tensor]], list[dict[str, Any]]]


def save(memory: KeepLora, folder: Path) -> Path:
    """Write a memory; an existing folder is replaced, but only one that holds a memory or nothing.

    Raises:
        RunError: if the folder holds other files.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise RunError(f"{folder} holds files that are no memory", "give a new or empty folder")
    with whole_folder(folder) as tmp_dir:
        for index, state in enumerate(memory.states):
            if state:
                write_tensors(_place(tmp_dir, index, STATE), state)
        for index, task in enumerate(memory.tasks, 1):
            _place(tmp_dir, index, DELTA).parent.mkdir(exist_ok=True)
            save_deltas(_place(tmp_dir, index, DELTA), task.deltas)
        _write_adapter(memory, tmp_dir)
        write_bytes(tmp_dir / "README.md", _card(memory).encode())
        files = sorted(path for path in tmp_dir.rglob("*.safetensors"))
        record = memory.settings() | {
            "format": FORMAT,
            "version": __version__,
            "tasks": [{"name": task.name, "report": task.report} for task in memory.tasks],
            "files": {path.relative_to(tmp_dir).as_posix(): file_hash(path) for path in files},
        }
        write_json(tmp_dir / RECORD, record)
    return folder


def load(folder: Path | str) -> Loaded:
    """Read what `save` wrote, from a folder or the Hub.

    Returns:
        (the record, the method's state after the base and after each task, each task's name, deltas and
        report).

    Raises:
        ConfigError: if there is no such folder and the name is none on the Hub.
        RunError: if the files are damaged, or are no memory.
    """
    with tempfile.TemporaryDirectory() as tmp_dir:
        place = Path(folder) if Path(folder).is_dir() else download(str(folder), None, Path(tmp_dir))
        if not (place / RECORD).is_file():
            raise RunError(
                f"{folder} holds no memory (no {RECORD})", "give a folder that KeepLora.save wrote"
            )
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
        states, tasks = [], []
        for index in range(len(record["tasks"]) + 1):
            path = _place(place, index, STATE)
            states.append(read_tensors(path) if _listed(path, place, record) else {})
        for index, task in enumerate(record["tasks"], 1):
            path = _place(place, index, DELTA)
            if not _listed(path, place, record):
                raise RunError(f"{place / RECORD} lists no update of task '{task['name']}'", AGAIN)
            tasks.append({**task, "deltas": load_deltas(path)})
    return record, states, tasks


def check_base(memory: KeepLora, record: Mapping[str, Any]) -> None:
    """Check that a memory's model has the weights that the record was made from.

    Raises:
        MethodError: naming a layer that differs.
    """
    expected = record["base"]["weights"]
    if set(expected) != set(memory.layers):
        missing = sorted(set(expected) ^ set(memory.layers))
        raise MethodError(
            f"the model has other layers than the base of this memory, {record['base']['name_or_path']}: "
            f"{len(missing)} differ, first {missing[0]}",
            "load the model that the memory was made from",
        )
    for name, layer in memory.layers.items():
        if fingerprint(layer.module.weight) != expected[name]:
            raise MethodError(
                f"the weights of {name} are not those of the base that this memory was made from "
                f"({record['base']['name_or_path'] or record['base']['model']})",
                "load the base itself, in the same dtype, and not a model that the tasks are merged into",
            )


def push(memory: KeepLora, repo_id: str) -> str:
    """Upload a memory to the Hub and return the repository's URL; see `KeepLora.push_to_hub`."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as tmp_dir:
        return upload(memory.save(Path(tmp_dir) / "memory"), repo_id)


def _place(folder: Path, index: int, name: str) -> Path:
    return folder / f"task-{index:02d}" / name


def _listed(path: Path, folder: Path, record: Mapping[str, Any]) -> bool:
    return path.relative_to(folder).as_posix() in record["files"]


def _write_adapter(memory: KeepLora, folder: Path) -> None:
    """Write the sum of the updates as a PEFT adapter, if a task has changed a layer."""
    changes: list[dict[str, Delta | FullDelta]] = [
        {name: delta for name, delta in task.deltas.items() if bool(delta.B.any())} for task in memory.tasks
    ]
    if any(changes):
        base = Base(memory.base_name or "", None, None)
        write_adapter(folder, combine(changes), memory.model, {}, base)


def _card(memory: KeepLora) -> str:
    """Return a model card: what the memory holds and the lines that load it."""
    base = memory.base_name or type(memory.model).__name__
    tasks = "\n".join(f"{index}. {task.name}" for index, task in enumerate(memory.tasks, 1)) or "none yet"
    header = f"base_model: {base}\n" if memory.base_name else ""
    return f"""---
library_name: peft
{header}tags:
- keeplora
- continual-learning
---

# What a {type(memory.model).__name__} has learned, and the subspaces that protect it

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
