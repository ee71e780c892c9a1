"""Loading a model for evaluation by name or path, the embedded tiny one included."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_keeplora_eval.errors import EvalError

#: Models that come with the training half; found by name, never imported.
EMBEDDED = ("tiny-clip", "tiny-llava")


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


def load_predictor(name: str, recipe, device: str, max_new_tokens: int = 128):
    """The model that answers a task: any CLIP checkpoint for classification, any LLaVA checkpoint for every kind.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        recipe: the task.
        device: where to put the model.
        max_new_tokens: where a LLaVA model's answer is cut off at the latest.

    Raises:
        EvalError: the model cannot be loaded, is of neither family, or cannot answer this kind of task.
    """
    # Seconds to import, which the other commands don't need.
    from transformers import AutoConfig

    from llava_keeplora_eval.llava import LLAVA_MODELS, LlavaPredictor
    from llava_keeplora_eval.predictors import ClipPredictor

    with _told(name):
        kind = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False).model_type
    if kind in LLAVA_MODELS:
        model, processor = load_llava(name, device)
        return LlavaPredictor(model, processor, recipe, max_new_tokens)
    if recipe.kind != "classification":
        raise EvalError(
            f"task '{recipe.name}' is {recipe.kind}, and '{name}' is a {kind} model, which answers classification at most",
            "give a LLaVA checkpoint, or predict with your own model, write a JSONL file, and score that",
        )
    model, processor = load_clip(name, device)
    return ClipPredictor(model, processor, recipe)


def load_llava(name: str, device: str | None = None):
    """Load a LLaVA checkpoint, in eval mode, with its processor.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        device: where to put it; the CPU when None.

    Returns:
        (model, processor).

    Raises:
        EvalError: it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    path = resolve_model(name)
    with _told(name):
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=False).eval()
        return (model.to(device) if device else model), load_llava_processor(path)


def load_llava_processor(path: str, revision: str | None = None):
    """The processor of a LLaVA checkpoint, for images and text.

    LLaVA-OneVision's wants a video processor, which only exists where torchvision is; here it is put together without.

    Args:
        path: a folder or a Hub id.
        revision: the Hub revision.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaOnevisionProcessor

    if AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).model_type != "llava_onevision":
        return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)

    class WithoutVideos(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor" or argument is not None:
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    settings, _ = LlavaOnevisionProcessor.get_processor_dict(path, revision=revision)
    own = {key: settings[key] for key in ("num_image_tokens", "vision_feature_select_strategy", "chat_template") if key in settings}
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    own.setdefault("chat_template", getattr(tokenizer, "chat_template", None))
    image_processor = AutoImageProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    return WithoutVideos(image_processor=image_processor, tokenizer=tokenizer, **own)


@contextmanager
def _told(name: str):
    """Say in a sentence what kept a model from loading."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise EvalError(f"model '{name}' cannot be loaded ({reason})", "give a folder with a checkpoint, or a Hub id") from error


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
    with _told(name):
        model = AutoModel.from_pretrained(path, trust_remote_code=False)
        processor = ClipProcessor(AutoImageProcessor.from_pretrained(path, trust_remote_code=False), AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise EvalError(
            f"model '{name}' is a {type(model).__name__}, and zero-shot classification needs a CLIP model",
            "give a CLIP checkpoint",
        )
    model.eval()
    return (model.to(device) if device else model), processor
