"""Checkpoints as files.

Where they lie, what they hold by content, and loading with every tensor accounted for.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.guard import is_exhaustion
from llava_keeplora_recipes.errors import UserError, nearest

#: In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

#: File that PEFT writes next to an adapter's weights.
ADAPTER = "adapter_config.json"

AGAIN = "download the checkpoint again, or give another one"

DIVERGED = "download the checkpoint again, or take one whose training did not diverge"

OTHER_CONFIG = "download the checkpoint again, or give the one that its config.json belongs to"

UNQUANTISED = "give the checkpoint that it was quantised from; a run quantises it with model.quantization"

#: Older checkpoints hold tensors that newer code computes; those of a vision encoder's own head have no use
#: in a LLaVA.
COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked")

UNUSED = ("vision_model.head.", "vision_tower.head.")


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
    if (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or known
        or not HUB_ID.fullmatch(name)
    ):
        hint = nearest(
            name, [str(parent / p.name) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        )
        cure = (
            hint
            if hint.startswith("did you mean")
            else "give a folder with a checkpoint, or a Hub id (user/name)"
        )
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
        if not _is_file(path):
            continue
        if path.suffix != ".json":
            return [path]
        try:
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            if not all(isinstance(name, str) and name == Path(name).name for name in names):
                raise ValueError("it names something other than files of its folder")
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvalError(
                f"{path} is no index of a checkpoint's weights ({_reason(error)})", AGAIN
            ) from error
        missing = [file.name for file in files if not _is_file(file)]
        if missing:
            raise EvalError(
                f"{path} names {len(missing)} files that are not there ({', '.join(missing[:3])}), so their "
                "weights are missing",
                "download the checkpoint again",
            )
        return files
    return []


def _is_file(path: Path) -> bool:
    """Return whether a file of weights is there.

    Raises:
        EvalError: it is something else than a file.
    """
    if path.is_symlink() and not path.exists():
        raise EvalError(f"{path} is a link to nothing", AGAIN)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise EvalError(f"{path} is {what}, and weights are a file", AGAIN)
    return path.is_file()


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
        EvalError: a file that cannot be read, tensors that are missing, unknown or of another shape, or
            values that are no numbers.
    """
    folder = Path(place)
    if (folder / ADAPTER).is_file():
        raise EvalError(
            f"{folder} holds an adapter ({ADAPTER}), which transformers would load along with the model",
            "move it out, or give its base",
        )
    held = check_weight_files(folder) if folder.is_dir() else {}
    if options.get("quantization_config") is not None:
        check_values(place, options.get("revision"))
    with loading(place), _quiet():
        model, info = auto_class.from_pretrained(
            place, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True, **options
        )
    what = _where(place)
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(COMPUTED))
    unknown = sorted(filter(_has_place, info["unexpected_keys"]))
    # With ZeRO-3 transformers does not say which tensors of the files have no place, so they are counted.
    surplus = sum(map(_has_place, held)) - len(model.state_dict())
    if not unknown and surplus > 0:
        raise EvalError(
            f"{what} holds {surplus} tensors more than the model of its config.json has", OTHER_CONFIG
        )
    shapes = [
        f"{name}: {tuple(held)} for {tuple(wanted)}" for name, held, wanted in info.get("mismatched_keys", ())
    ]
    errors = [
        _reason(error) if isinstance(error, BaseException) else str(error).splitlines()[0]
        for error in info.get("error_msgs", ())
    ]
    for names, problem in (
        (missing, "lacks {} of the model's tensors ({}), which would be drawn at random"),
        (unknown, "holds {} tensors that the model of its config.json does not have ({})"),
        (shapes, "holds {} tensors of another shape than its config.json says ({})"),
        (errors, "could not be loaded whole: {} errors ({})"),
    ):
        if names:
            first = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            raise EvalError(f"{what} {problem.format(len(names), first)}", OTHER_CONFIG)
    check_finite(model, place)
    return model.eval()


def _has_place(name: str) -> bool:
    """Return whether a checkpoint's tensor has a place in the model."""
    return not name.endswith(COMPUTED) and not any(part in name for part in UNUSED)


def check_weight_files(folder: Path) -> dict[str, Path]:
    """Refuse a local checkpoint one of whose weight files is damaged, by name.

    Returns:
        name of a tensor → the file that holds it.

    Raises:
        EvalError: naming the file: it cannot be read, holds a tensor that another shard holds too, or weights
            that are no floating-point numbers, which transformers would cast without a word.
    """
    files = weight_files(folder)
    if not files and (folder / "config.json").is_file():
        raise EvalError(f"{folder} holds a config.json and no weights ({', '.join(WEIGHTS)})", AGAIN)
    holders: dict[str, Path] = {}
    for path in files:
        kinds = _tensor_kinds(path)
        if repeated := sorted(holders.keys() & kinds):
            raise EvalError(
                f"{path} holds {len(repeated)} tensors that {holders[repeated[0]].name} holds too (first "
                f"{repeated[0]})",
                AGAIN,
            )
        holders |= dict.fromkeys(kinds, path)
        if whole := sorted(
            name for name, is_float in kinds.items() if not is_float and not name.endswith(COMPUTED)
        ):
            raise EvalError(
                f"{path} holds {len(whole)} tensors of whole or complex numbers, as quantised checkpoints do "
                f"(first {whole[0]})",
                UNQUANTISED,
            )
    return holders


def _tensor_kinds(path: Path) -> dict[str, bool]:
    """Read a weight file's directory: name of a tensor → whether it is floating point.

    Raises:
        EvalError: it cannot be read.
    """
    import safetensors

    try:
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError("it is a pointer of Git LFS; run `git lfs pull`")
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: "F" in file.get_slice(name).get_dtype() for name in file.keys()}
        return {name: value.is_floating_point() for name, value in _open_pickled(path).items()}
    except MemoryError:
        raise
    except Exception as error:  # safetensors, pickle and zip each raise their own.
        if is_exhaustion(error):
            raise
        raise EvalError(
            f"the weights in {path} cannot be read ({_reason(error)})",
            "download the checkpoint again, or make the file readable",
        ) from error


def check_values(place: str, revision: str | None = None) -> None:
    """Refuse a checkpoint whose files hold NaN or infinity, which quantising hides.

    Args:
        place: a folder or a Hub id.
        revision: on the Hub.

    Raises:
        EvalError: naming the file and the first such tensor.
    """
    if spoilt := _spoilt(place, revision):
        raise EvalError(f"{spoilt[0]} holds NaN or infinity (in {spoilt[1]})", DIVERGED)


def check_finite(model, place: str) -> None:
    """Refuse weights that are not numbers: a loss on them is NaN, whatever the settings.

    With weights in shards over several processes, each looks at its own.

    Raises:
        EvalError: naming the file and the first such tensor, and how many there are.
    """
    import torch

    values = {
        name: getattr(value, "ds_tensor", value)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    bad = [
        name
        for name, value in values.items()
        if value.is_floating_point()
        and not value.is_meta
        and value.numel()
        and not torch.isfinite(torch.stack(value.aminmax())).all()
    ]
    if bad:
        first = ", ".join(bad[:2]) + (", ..." if len(bad) > 2 else "")
        spoilt = _spoilt(place)
        raise EvalError(
            f"{spoilt[0] if spoilt else _where(place)} holds NaN or infinity (in {len(bad)} tensors of the "
            f"model: {first})",
            DIVERGED,
        )


def _spoilt(place: str, revision: str | None = None) -> tuple[Path, str] | None:
    """Find the file of a checkpoint, and the tensor in it, that holds values that are not numbers."""
    from transformers.utils import cached_file

    folder = Path(place)
    if not folder.is_dir():
        with loading(place):
            folder = Path(cached_file(place, "config.json", revision=revision)).parent
    for path in weight_files(folder):
        bad = next((name for name, value in read_tensors(path) if not _is_finite(value)), None)
        if bad:
            return path, bad
    return None


def read_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of everything that a weight file holds, except what is computed on loading."""
    import safetensors
    import torch

    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys() if not name.endswith(COMPUTED))
        return
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    yield from ((name, value) for name, value in tensors.items() if not name.endswith(COMPUTED))


def _is_finite(value) -> bool:
    import torch

    return (
        not value.is_floating_point()
        or not value.numel()
        or bool(torch.isfinite(value.float() if value.itemsize == 1 else value).all())
    )


def check_device(device: str) -> str:
    """Return a device's name if this machine has it.

    Raises:
        EvalError: for a name that is none, or a GPU that is not there.
    """
    import torch

    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise EvalError(
            f"the device '{device}' cannot be used on this machine, which has {', '.join(have)}",
            "choose one of these with --device",
        ) from error
    return device


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever keeps a model, a processor or a configuration from loading into one sentence.

    Raises:
        EvalError: naming the model and the reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Libraries raise errors of every kind for damaged files.
        if is_exhaustion(error):
            raise
        cure = (
            "give a folder with a whole checkpoint, an embedded model, or a Hub id that this machine "
            "can reach"
        )
        raise EvalError(
            f"the model '{name}' cannot be loaded ({_reason(error)})",
            "install what is missing" if isinstance(error, ImportError) else cure,
        ) from error


def _open_pickled(path: Path) -> dict[str, Any]:
    """Read the directory of a pickled checkpoint: its tensors without their values."""
    import torch

    tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(value, torch.Tensor) for value in tensors.values())
    ):
        raise ValueError("it holds something other than tensors by name")
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what transformers says while it loads.

    That is the progress bar, and the table of what `load_checked` refuses.
    """
    from transformers.utils import logging as progress

    logger = logging.getLogger("transformers.modeling_utils")
    disabled, bar = logger.disabled, progress.is_progress_bar_enabled()
    # Disabled, as with a level of its own it warns that a model in one process is not split between several.
    logger.disabled = True
    progress.disable_progress_bar()
    try:
        yield
    finally:
        logger.disabled = disabled
        if bar:
            progress.enable_progress_bar()


def _where(place: str) -> str:
    """Name the file that says which tensors a checkpoint holds."""
    present = [Path(place) / name for name in WEIGHTS if (Path(place) / name).is_file()]
    return str(present[0]) if present else f"the checkpoint '{place}'"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with loading(str(path)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # A KeyError's text is the key alone.
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text or type(error).__name__
    )[:300].rstrip(". ")
