"""Identity of a model by content: its weights, configuration, processor and template, in whatever folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora_eval.checkpoints import _json, loading, read_tensors, weight_files
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import file_hash, write_atomic

#: Files that define how images and text become tensors, the chat template included.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)

#: Keys of a configuration that depend on how it was written, not on the model.
WRITTEN_BY = ("_name_or_path", "transformers_version")

#: The same of a processor's files.
PROCESSOR_WRITTEN_BY = (*WRITTEN_BY, "name_or_path")

#: Prefix of the keys of a record of a model in memory.
OBJECT = "object_"

#: Key of a record that holds a checkpoint's `tensors_hash`.
TENSORS = "tensors"

#: Seconds within which a file may change again and keep its time stamp.
RECENT = 2.0


def model_content(place: str, revision: str | None = None) -> dict[str, Any]:
    """Return a record of a checkpoint's content: two checkpoints with equal records give the same answers.

    Args:
        place: a folder or a Hub id.
        revision: a branch, tag or commit on the Hub.

    Returns:
        for a folder, SHA-256 hashes of `weights`, `config` and `processor`, and the end tokens `stops` of its
        generation settings; for a model on the Hub, its `commit`.

    Raises:
        EvalError: a file cannot be read.
    """
    folder = Path(place)
    if not folder.is_dir():
        with loading(place):
            return {"commit": hub_commit(place, revision)}
    try:
        weights = {path.name: content_hash(path) for path in weight_files(folder)}
        processor = {name: content_hash(folder / name) for name in PROCESSOR if (folder / name).is_file()}
        templates = {
            f"additional_chat_templates/{p.name}": content_hash(p)
            for p in sorted(folder.glob("additional_chat_templates/*"))
            if p.is_file()
        }
        config, generation = (_json(folder / name) for name in ("config.json", "generation_config.json"))
    except OSError as error:
        raise EvalError(
            f"{error.filename} cannot be read ({error.strerror})",
            "make it readable, or download the checkpoint again",
        ) from error
    config = {key: value for key, value in config.items() if key not in WRITTEN_BY}
    return {
        "weights": _digest(weights),
        "config": _digest(config),
        "processor": _digest(processor | templates),
        "stops": generation.get("eos_token_id"),
    }


def hub_commit(name: str, revision: str | None = None) -> str:
    """Return the commit of a model on the Hub, without the network if its configuration is in the cache.

    The commit is the name of the folder `snapshots/<commit>` in the cache, which `huggingface_hub` documents;
    recent versions of transformers don't store it in a configuration.

    Args:
        name: the model's id, `user/name`.
        revision: a branch, tag or commit; the main branch when None.

    Raises:
        OSError: the Hub has no such model, or it is not cached and the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name


def content_changes(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str] | None:
    """Compare two records of `model_content`.

    Returns:
        names of the fields that differ; None if the records have no common field, as a folder's and the
        Hub's.
    """
    common = [key for key in known if key in now and known[key] is not None and now[key] is not None]
    changed = [
        key
        for key in known.keys() & now.keys()
        if known[key] != now[key] and (key in common or key == "stops")
    ]
    return sorted(changed) if common else None


def changes_at(
    known: Mapping[str, Any], place: str, revision: str | None = None, now: Mapping[str, Any] | None = None
) -> list[str] | None:
    """Compare a record with a checkpoint; the same tensors in other files or another format are no change.

    Args:
        known: a record of `model_content`, with the checkpoint's `tensors_hash` under `TENSORS` if known.
        place, revision: see `model_content`.
        now: the checkpoint's `model_content`, if it is known already.

    Returns:
        see `content_changes`.
    """
    changed = content_changes(known, now or model_content(place, revision))
    if changed and "weights" in changed and TENSORS in known and known[TENSORS] == tensors_hash(Path(place)):
        changed.remove("weights")
    return changed


def tensors_hash(folder: Path) -> str:
    """Return a hash of a local checkpoint's tensors, whatever files and format hold them.

    It covers each tensor's name, dtype, shape and bytes, except tensors that are computed on loading, and is
    cached like those of files, see `content_hash`.

    Args:
        folder: the checkpoint's folder.

    Raises:
        EvalError: a file of weights cannot be read.
    """
    files = weight_files(folder)
    key = _digest([TENSORS, *map(content_hash, files)])
    cached_hash = _kept(key)
    if cached_hash is None:
        with loading(str(folder)):
            tensors = [
                (name, str(value.dtype), list(value.shape), _bytes_hash(value))
                for path in files
                for name, value in read_tensors(path)
            ]
        cached_hash = _digest(sorted(tensors))
        _keep(key, cached_hash)
    return cached_hash


def object_content(model: Any, processor: Any) -> dict[str, Any]:
    """Return a record of the content of a model and a processor in memory; see `model_content`.

    Such records are comparable with one another, not with those of files.

    Args:
        model: of transformers.
        processor: with a `tokenizer` and an `image_processor`.
    """
    tensors = [
        (name, str(value.dtype), list(value.shape), _bytes_hash(value))
        for name, value in model.state_dict().items()
    ]
    config = {key: value for key, value in model.config.to_dict().items() if key not in WRITTEN_BY}
    with tempfile.TemporaryDirectory() as folder:
        save_processor(processor, Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        settings = {path.relative_to(folder).as_posix(): _settings(path) for path in files}
    generation = getattr(model, "generation_config", None)
    return {
        f"{OBJECT}weights": _digest(sorted(tensors)),
        f"{OBJECT}config": _digest(json.loads(json.dumps(config, default=str))),
        f"{OBJECT}processor": _digest(settings),
        f"{OBJECT}stops": getattr(generation, "eos_token_id", None),
    }


def is_object(record: Mapping[str, Any]) -> bool:
    """Return whether a record is of a model in memory; see `object_content`."""
    return any(key.startswith(OBJECT) for key in record)


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor's files, or those of its image processor and tokenizer.

    Padding and truncation of the last texts, which transformers leaves in `tokenizer.json`
    (github.com/huggingface/transformers/issues/24441), are taken out.
    """
    for part in (
        (processor,)
        if hasattr(processor, "save_pretrained")
        else (processor.image_processor, processor.tokenizer)
    ):
        part.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8")) | {"padding": None, "truncation": None}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _settings(path: Path) -> Any:
    """Return the content of a processor's file without what changes when it is written again."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    if not isinstance(content, dict):
        return file_hash(path)
    return {key: value for key, value in content.items() if key not in PROCESSOR_WRITTEN_BY}


def _bytes_hash(tensor: Any) -> str:
    import torch

    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.data).hexdigest()


def content_hash(path: Path) -> str:
    """Return a file's SHA-256, cached by its path, size and time stamps so that large weights are read once.

    The cache is in `$LLAVA_KEEPLORA_CACHE`, by default in the user's cache folder; if it cannot be written,
    the file is read each time.
    """
    stat = path.stat()
    key = _digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    cached_hash = _kept(key)
    if cached_hash is None:
        cached_hash = file_hash(path)
        if time.time() - stat.st_mtime > RECENT:
            _keep(key, cached_hash)
    return cached_hash


def _kept(key: str) -> str | None:
    """Return the hash that is cached under a key; None if there is none."""
    try:
        known = _kept_path(key).read_text()
    except (OSError, ValueError):
        return None
    return known if re.fullmatch(r"[0-9a-f]{64}", known) else None


def _keep(key: str, value: str) -> None:
    path = _kept_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, value)
    except OSError:
        pass  # It is only hashed again.


def _kept_path(key: str) -> Path:
    root = (
        os.environ.get("LLAVA_KEEPLORA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-keeplora"
    )
    return Path(root) / "hashes" / key[:32]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
