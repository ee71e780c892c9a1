"""What a model is by content: its weights, configuration, processor and template, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from llava_keeplora_eval.checkpoints import _json, loading, weight_files
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import file_hash, write_atomic

#: What turns pictures and text into tensors, the chat template included.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)

#: Keys of a configuration that say who wrote it, not what the model is.
WRITTEN_BY = ("_name_or_path", "transformers_version")

#: Seconds within which a file may change again without another time stamp.
RECENT = 2.0


def model_content(place: str, revision: str | None = None) -> dict[str, Any]:
    """Say what a checkpoint is by content: two with the same record give the same answers.

    Args:
        place: a folder or a Hub id.
        revision: on the Hub.

    Returns:
        of a folder, SHA-256 hashes of `weights`, `config` and `processor`, and the `stops` of its generation
        settings; of the Hub's, its `commit`.

    Raises:
        EvalError: a file that cannot be read.
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
    """Return the commit of a model on the Hub.

    The network is not used where the model's configuration is in the Hub's cache.

    The cache keeps the files of a commit in `snapshots/<commit>`, which `huggingface_hub` documents; recent
    versions of transformers keep no commit in a configuration.

    Args:
        name: of the model, `user/name`.
        revision: a branch, tag or commit; the main branch when None.

    Raises:
        OSError: the Hub has no such model, or it is neither cached nor within reach.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name


def content_changes(known: dict[str, Any], now: dict[str, Any]) -> list[str] | None:
    """Compare two records of `model_content`.

    Returns:
        names of what differs; None where they have nothing in common to compare, as a folder's and the Hub's.
    """
    common = [key for key in known if key in now and known[key] is not None and now[key] is not None]
    changed = [
        key
        for key in known.keys() & now.keys()
        if known[key] != now[key] and (key in common or key == "stops")
    ]
    return sorted(changed) if common else None


def content_hash(path: Path) -> str:
    """Return a file's SHA-256, kept by its place, size and time stamps so that large weights are read once.

    It is kept in `$LLAVA_KEEPLORA_CACHE`, by default in the user's cache folder; a folder that cannot be
    written keeps nothing.
    """
    stat = path.stat()
    key = _digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    root = (
        os.environ.get("LLAVA_KEEPLORA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-keeplora"
    )
    kept = Path(root) / "hashes" / key[:32]
    try:
        known = kept.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except (OSError, ValueError):
        pass
    found = file_hash(path)
    if time.time() - stat.st_mtime > RECENT:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, found)
        except OSError:
            pass  # It is only hashed again.
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
