"""Checkpoints as files: where they lie, what they hold by content, and loading with every tensor accounted for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_recipes.errors import UserError, nearest

#: In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: What turns pictures and text into tensors, the chat template included.
PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja",
)
#: Keys of a configuration that say who wrote it, not what the model is.
WRITTEN_BY = ("_name_or_path", "transformers_version")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
#: Older checkpoints hold tensors that newer code computes.
COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked")
#: Seconds within which a file may change again without another time stamp.
RECENT = 2.0


def check_place(name: str, embedded: tuple[str, ...] = ()) -> None:
    """Refuse a name that can only be meant as a folder of this machine, and is none.

    Args:
        name: a model's folder, Hub id or embedded name.
        embedded: names of embedded models, for the hint.

    Raises:
        EvalError: with the nearest name that is there.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        raise EvalError(f"the model '{name}' is a file, and a checkpoint is a folder", f"give {path.parent}")
    parent = path.parent
    known = parent.is_dir() and str(parent) != "."
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or known or not HUB_ID.fullmatch(name):
        hint = nearest(name, [str(parent / p.name) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else [])
        cure = hint if hint.startswith("did you mean") else "give a folder with a checkpoint, or a Hub id (user/name)"
        raise EvalError(f"there is no folder '{name}' for the model to be loaded from", cure)
    close = nearest(name, embedded)
    if "/" not in name and close.startswith("did you mean"):
        raise EvalError(f"there is no model '{name}', neither a folder nor an embedded one", close)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a local checkpoint's weights, those of an index in its order.

    Args:
        folder: of the checkpoint.

    Raises:
        EvalError: an index that cannot be read, or that names a file that is not there.
    """
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        try:
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            files = [folder / str(name) for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvalError(f"{path} is no index of a checkpoint's weights ({_reason(error)})", "download the checkpoint again") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise EvalError(
                f"{path} names {len(missing)} files that are not there ({', '.join(missing[:3])}), so their weights are missing",
                "download the checkpoint again",
            )
        return files
    return []


def model_content(place: str, revision: str | None = None) -> dict[str, Any]:
    """Say what a checkpoint is by content: two with the same record give the same answers.

    Args:
        place: a folder or a Hub id.
        revision: on the Hub.

    Returns:
        of a folder, SHA-256 hashes of `weights`, `config` and `processor`, and the `stops` of its generation settings; of the
        Hub's, its `commit`.

    Raises:
        EvalError: a file that cannot be read.
    """
    folder = Path(place)
    if not folder.is_dir():
        from transformers import AutoConfig

        with loading(place):
            return {"commit": getattr(AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False), "_commit_hash", None)}
    try:
        weights = {path.name: content_hash(path) for path in weight_files(folder)}
        processor = {name: content_hash(folder / name) for name in PROCESSOR if (folder / name).is_file()}
        templates = {f"additional_chat_templates/{p.name}": content_hash(p) for p in sorted(folder.glob("additional_chat_templates/*")) if p.is_file()}
        config, generation = (_json(folder / name) for name in ("config.json", "generation_config.json"))
    except OSError as error:
        raise EvalError(f"{error.filename} cannot be read ({error.strerror})", "make it readable, or download the checkpoint again") from error
    config = {key: value for key, value in config.items() if key not in WRITTEN_BY}
    return {
        "weights": _digest(weights), "config": _digest(config), "processor": _digest(processor | templates),
        "stops": generation.get("eos_token_id"),
    }


def content_changes(known: dict[str, Any], now: dict[str, Any]) -> list[str] | None:
    """Compare two records of `model_content`.

    Returns:
        names of what differs; None where they have nothing in common to compare, as a folder's and the Hub's.
    """
    common = [key for key in known if key in now and known[key] is not None and now[key] is not None]
    changed = [key for key in known.keys() & now.keys() if known[key] != now[key] and (key in common or key == "stops")]
    return sorted(changed) if common else None


def content_hash(path: Path) -> str:
    """Return a file's SHA-256, kept by its place, size and time stamps so that large weights are read once.

    It is kept in `$LLAVA_KEEPLORA_CACHE`, by default in the user's cache folder; a folder that cannot be written keeps nothing.
    """
    stat = path.stat()
    key = _digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    root = os.environ.get("LLAVA_KEEPLORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-keeplora"
    kept = Path(root) / "hashes" / key[:32]
    try:
        known = kept.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except (OSError, ValueError):
        pass
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_mtime > RECENT:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, found)
        except OSError:
            pass  # It is only hashed again.
    return found


def load_checked(auto_class, place: str, **options):
    """Load a model's weights and refuse a checkpoint that does not hold exactly the model's tensors.

    transformers draws at random what a checkpoint lacks, and says so only in its log.

    Args:
        auto_class: a class of transformers with `from_pretrained`.
        place: a folder or a Hub id.
        options: of `from_pretrained`.

    Returns:
        the model, in eval mode.

    Raises:
        EvalError: a file that cannot be read, tensors that are missing, unknown or of another shape, or values that are no numbers.
    """
    if Path(place).is_dir():
        check_weight_files(Path(place))
    with loading(place):
        model, info = auto_class.from_pretrained(place, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True, **options)
    what = _where(place)
    missing, unexpected = (
        sorted(name for name in info[key] if not name.endswith(COMPUTED)) for key in ("missing_keys", "unexpected_keys")
    )
    for names, problem in (
        (missing, "lacks {} of the model's tensors ({}), which would be drawn at random"),
        (unexpected, "holds {} tensors that the model of its config.json does not have ({})"),
        ([f"{name}: {tuple(was)} for {tuple(is_)}" for name, was, is_ in info.get("mismatched_keys", ())], "holds {} tensors of another shape than its config.json says ({})"),
        ([str(message).splitlines()[0] for message in info.get("error_msgs", ())], "could not be loaded whole: {} errors ({})"),
    ):
        if names:
            raise EvalError(f"{what} {problem.format(len(names), ', '.join(names[:2]) + (', ...' if len(names) > 2 else ''))}",
                            "download the checkpoint again, or give the one that its config.json belongs to")
    check_finite(model, what)
    return model.eval()


def check_weight_files(folder: Path) -> None:
    """Refuse a local checkpoint one of whose weight files is damaged, by name.

    Raises:
        EvalError: naming the file.
    """
    import safetensors

    files = weight_files(folder)
    if not files and (folder / "config.json").is_file():
        raise EvalError(f"{folder} holds a config.json and no weights ({', '.join(WEIGHTS)})", "download the checkpoint again")
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, framework="pt") as file:
                    file.keys()
            else:
                _open_pickled(path)
        except Exception as error:  # safetensors, pickle and zip each raise their own.
            raise EvalError(f"the weights in {path} cannot be read ({_reason(error)})", "download the checkpoint again, or make the file readable") from error


def check_finite(model, what: str) -> None:
    """Refuse weights that are not numbers: a loss on them is NaN, whatever the settings.

    Raises:
        EvalError: naming the first such tensor and how many there are.
    """
    import torch

    bad = [name for name, value in model.state_dict().items() if value.is_floating_point() and value.device.type != "meta" and not torch.isfinite(value).all()]
    if bad:
        raise EvalError(f"{what} holds NaN or infinity in {len(bad)} tensors ({', '.join(bad[:2])})", "download the checkpoint again, or take one that trained without diverging")


def check_device(device: str) -> str:
    """Return a device's name if this machine has it.

    Raises:
        EvalError: for a name that is none, or a GPU that is not there.
    """
    import torch

    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EvalError(f"the device '{device}' cannot be used on this machine, which has {', '.join(have)}", "choose one of these with --device") from error
    return device


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever keeps a model, a processor or a configuration from loading into one sentence.

    Raises:
        EvalError: naming the model and the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and pickle raise errors of every kind for damaged files.
        raise EvalError(f"the model '{name}' cannot be loaded ({_reason(error)})", "give a folder with a whole checkpoint, an embedded model, or a Hub id that this machine can reach") from error


def _open_pickled(path: Path) -> None:
    """Read the directory of a pickled checkpoint without its tensors."""
    import torch

    torch.load(path, map_location="meta", weights_only=True, mmap=True)


def _where(place: str) -> str:
    files = weight_files(Path(place)) if Path(place).is_dir() else []
    return str(files[0]) if len(files) == 1 else f"the checkpoint {place}"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with loading(str(path)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(". ")
