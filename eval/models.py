"""Loading a model for evaluation by name or path, the embedded tiny one included."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llava_keeplora_eval.errors import EvalError

#: Models that come with the training half; found by name, never imported.
EMBEDDED = ("tiny-clip",)


@dataclass(frozen=True)
class ClipProcessor:
    """An image processor and a tokenizer side by side, as transformers' own processor has them.

    ``AutoProcessor`` needs every part of a checkpoint's processor to be installed; these two are enough.
    """

    image_processor: object
    tokenizer: object


def resolve_model(name: str) -> str:
    """The path of an embedded model, or the name as it is (a folder, or a Hub id).

    Args:
        name: an embedded model's name, a folder, or a Hub id.

    Raises:
        EvalError: an embedded model whose files are not installed.
    """
    if name not in EMBEDDED or Path(name).is_dir():
        return name
    package = importlib.util.find_spec("llava_keeplora")  # locates the folder; runs none of its code
    folders = [] if package is None else [Path(place) / "assets" / name for place in package.submodule_search_locations]
    for folder in folders:
        if (folder / "config.json").exists():
            return str(folder)
    raise EvalError(
        f"the embedded model '{name}' is not installed", "install the llava-keeplora package, or give a folder"
    )


def load_clip(name: str, device: str | None = None):
    """Load a CLIP checkpoint, in eval mode, with its image processor and tokenizer.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        device: where to put it; the CPU when None.

    Returns:
        (model, processor).

    Raises:
        EvalError: it cannot be loaded, or it is not of the CLIP family.
    """
    # Seconds to import, which the other commands don't need.
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    path = resolve_model(name)
    try:
        model = AutoModel.from_pretrained(path)
        processor = ClipProcessor(AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise EvalError(
            f"model '{name}' cannot be loaded ({reason})", "give a folder with a CLIP checkpoint, or a Hub id"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise EvalError(
            f"model '{name}' is a {type(model).__name__}, and zero-shot classification needs a CLIP model",
            "give a CLIP checkpoint",
        )
    model.eval()
    return (model.to(device) if device else model), processor
