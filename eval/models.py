"""Loading a model for evaluation by name or path, the embedded tiny one included."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_keeplora_eval.checkpoints import (
    ADAPTER,
    UNQUANTISED,
    check_device,
    check_finite,
    check_place,
    load_checked,
    loading,
)
from llava_keeplora_eval.class_prompts import PromptPreparation, check_kind
from llava_keeplora_eval.content import changes_at, content_hash, model_content
from llava_keeplora_eval.encoders import ENCODERS
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.generation import MAX_NEW_TOKENS
from llava_keeplora_eval.hub import check_reachable
from llava_keeplora_eval.layer_count import check_layer_count
from llava_keeplora_eval.preparation import ChatPreparation
from llava_keeplora_eval.processors import check_vocabulary, load_chat_processor

#: Models that come with the training half; found by name, never imported.
EMBEDDED = ("tiny-clip", "tiny-llava", "tiny-qwen")
#: What an export of a run says of itself.
EXPORT = "keeplora_export.json"
#: Model types of transformers → the family that answers with them; training and evaluation take the same.
FAMILIES = dict.fromkeys(ENCODERS, "clip") | dict.fromkeys(
    (
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "paligemma",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "smolvlm",
        "vipllava",
    ),
    "llava",
)


@dataclass(frozen=True)
class ClipProcessor:
    """An image processor and a tokenizer side by side, as transformers' own processor has them.

    ``AutoProcessor`` needs every part of a checkpoint's processor to be installed; these two are enough.
    """

    image_processor: object
    tokenizer: object


def resolve_model(name: str) -> str:
    """Return the path of an embedded model, or the name as it is (a folder, or a Hub id).

    Args:
        name: an embedded model's name, a folder, or a Hub id.

    Raises:
        EvalError: an embedded model whose files are not installed, or a folder that is not there.
    """
    if name not in EMBEDDED or Path(name).is_dir():
        check_place(name, EMBEDDED)
        return name
    package = importlib.util.find_spec("llava_keeplora")  # locates the folder; runs none of its code
    folders = (
        []
        if package is None
        else [Path(place) / "assets" / name for place in package.submodule_search_locations]
    )
    for folder in folders:
        if (folder / "config.json").exists():
            return str(folder)
    raise EvalError(
        f"the embedded model '{name}' is not installed",
        "install the llava-keeplora package, or give a folder",
    )


def model_family(name: str, revision: str | None = None) -> str:
    """Return the family of a checkpoint by the type that its configuration names.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        revision: on the Hub.

    Returns:
        `clip` for two encoders, `llava` for models that write text.

    Raises:
        EvalError: it cannot be read, or is of no supported family.
    """
    from transformers import AutoConfig

    if (Path(name) / ADAPTER).is_file():
        raise EvalError(
            f"'{name}' is an adapter, and a whole model is needed",
            "give its base model, `import` the adapter, or export it as merged",
        )
    path = resolve_model(name)
    check_reachable(path, revision)
    with loading(name):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        kind = config.model_type
    check_layer_count(config.to_dict(), name)
    if getattr(config, "quantization_config", None) is not None:
        raise EvalError(
            f"'{name}' is quantised already (its config.json has a quantization_config), and what is learned "
            "belongs to whole weights",
            UNQUANTISED,
        )
    if kind not in FAMILIES:
        raise EvalError(
            f"'{name}' is a '{kind}' model, and supported are the types {', '.join(FAMILIES)}",
            "take a checkpoint of one of these, name what loads it by model.family (docs/extending.md), or "
            "predict with your own code and score the file of answers",
        )
    return FAMILIES[kind]


def load_predictor(
    name: str,
    recipe,
    device: str,
    max_new_tokens: int = 128,
    base: str | None = None,
    generation: Mapping[str, Any] | None = None,
):
    """Load what answers a task.

    Any checkpoint of two encoders for classification, any LLaVA checkpoint for every kind, or an adapter of
    one.

    Args:
        name: an embedded model's name, a folder with a checkpoint or a PEFT adapter, or a Hub id.
        recipe: the task.
        device: where to put the model.
        max_new_tokens: where a LLaVA model's answer is cut off at the latest.
        base: of an adapter, where its base model lies here; as the adapter says when None.
        generation: settings of a LLaVA model's answers other than greedy ones; see `LlavaPredictor`.

    Raises:
        EvalError: the model cannot be loaded, is of no supported family, or cannot answer this kind of task.
    """
    # Seconds to import, which the other commands don't need.
    from llava_keeplora_eval.llava import LlavaPredictor
    from llava_keeplora_eval.predictors import ClipPredictor

    check_device(device)
    adapted = adapter_base(name, base)
    source, revision = adapted or (name, None)
    family = model_family(source, revision)
    if family == "clip":
        check_kind(recipe)
        if generation:
            raise EvalError(
                f"--generation is {dict(generation)}, and '{name}' is a CLIP model, which writes no answers",
                "leave it out",
            )
    model, processor = (load_clip if family == "clip" else load_llava)(source, device, revision)
    if adapted is not None:
        check_exported_base(Path(name), source, revision)
        model = with_adapter(model, name)
    if family == "clip":
        return ClipPredictor(model, processor, recipe)
    return LlavaPredictor(model, processor, recipe, max_new_tokens, generation=generation)


def adapter_base(name: str, base: str | None = None) -> tuple[str, str | None] | None:
    """Return the base model of a folder that holds a PEFT adapter, and its revision on the Hub.

    None for anything else.

    Args:
        name: a folder, a Hub id or an embedded name.
        base: where the base lies here; what the adapter names when None.

    Raises:
        EvalError: an adapter that names no base, or a base for what is no adapter.
    """
    path = Path(name) / ADAPTER
    if not path.is_file():
        if base is not None:
            raise EvalError(
                f"--base is '{base}', and '{name}' is no folder with an adapter ({ADAPTER})",
                "leave --base out",
            )
        return None
    if base is not None:
        return base, None
    with loading(name):
        config = json.loads(path.read_text(encoding="utf-8"))
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named:
        raise EvalError(f"{path} names no base model", "say where it lies with --base")
    if not isinstance(revision, str | None):
        raise EvalError(
            f"{path} has the revision {revision!r} of its base, which is no text",
            "write a branch, a tag or a commit",
        )
    return named, revision


def check_exported_base(folder: Path, base: str, revision: str | None) -> None:
    """Refuse another base than the one that an exported adapter was trained on.

    Exports record it by content; older ones don't, and are not checked.

    Raises:
        EvalError: naming what differs.
    """
    path = folder / EXPORT
    if not path.is_file():
        return
    with loading(str(folder)):
        known = json.loads(path.read_text(encoding="utf-8")).get("base")
    if isinstance(known, dict) and (changed := changes_at(known, resolve_model(base), revision)):
        raise EvalError(
            f"the base model '{base}' is not the one that the adapter {folder} was trained on "
            f"({', '.join(changed)} differ)",
            "give that one with --base",
        )


def made_by(name: str, predictor, base: str | None = None) -> dict[str, Any]:
    """Return what a model's answers depend on besides the data: the model's content, and its settings.

    Args:
        name, base: as for `load_predictor`.
        predictor: what that gave.
    """
    adapted = adapter_base(name, base)
    adapter = (
        {}
        if adapted is None
        else {
            "adapter": {p.name: content_hash(p) for p in sorted(Path(name).glob("adapter_*")) if p.is_file()}
        }
    )
    source, revision = adapted or (name, None)
    return {"model": model_content(resolve_model(source), revision), **adapter, **predictor.settings}


def with_adapter(model, folder: str):
    """Put a PEFT adapter on its base, unmerged.

    In a base of half precision a merge would round small updates away.

    Raises:
        EvalError: it cannot be loaded, does not fit the base, or holds values that are not numbers.
    """
    from peft import PeftModel

    with loading(folder):
        adapted = PeftModel.from_pretrained(model, folder)
        result = adapted.load_adapter(folder, "default")
        lost = sorted(name for name in getattr(result, "missing_keys", ()) if "lora_" in name)
        if lost or getattr(result, "unexpected_keys", ()):
            raise EvalError(
                f"the adapter {folder} does not fit its base: {len(lost)} of its tensors are missing and "
                f"{len(result.unexpected_keys)} have no place",
                "give the base that it was trained on with --base, or download it again",
            )
        check_finite(adapted, folder)
        return adapted.get_base_model().eval()


def load_llava(name: str, device: str | None = None, revision: str | None = None):
    """Load a LLaVA checkpoint, in eval mode, with its processor.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        device: where to put it; the CPU when None.
        revision: on the Hub.

    Returns:
        (model, processor).

    Raises:
        EvalError: it cannot be loaded; see `load_checked`.
    """
    from transformers import AutoModelForImageTextToText

    path = resolve_model(name)
    model = load_checked(AutoModelForImageTextToText, path, revision=revision)
    return (model.to(device) if device else model), load_chat_processor(path, revision)


def load_clip_processor(path: str, revision: str | None = None) -> ClipProcessor:
    """Load the image processor and tokenizer of a checkpoint with two encoders.

    Args:
        path: a folder or a Hub id.
        revision: the Hub revision.

    Raises:
        EvalError: one of them cannot be loaded.
    """
    # Seconds to import, which the other commands don't need.
    from transformers import AutoImageProcessor, AutoTokenizer

    source = {"revision": revision, "trust_remote_code": False}
    with loading(path):
        processor = ClipProcessor(
            AutoImageProcessor.from_pretrained(path, **source), AutoTokenizer.from_pretrained(path, **source)
        )
    check_vocabulary(processor.tokenizer, path)
    return processor


def load_clip(name: str, device: str | None = None, revision: str | None = None):
    """Load a checkpoint with two encoders, in eval mode, with its image processor and tokenizer.

    Args:
        name: an embedded model's name, a folder, or a Hub id.
        device: where to put it; the CPU when None.
        revision: on the Hub.

    Returns:
        (model, processor).

    Raises:
        EvalError: it cannot be loaded (see `load_checked`), or it is not of the family `clip`.
    """
    from transformers import AutoModel  # Seconds to import, which the other commands don't need.

    path = resolve_model(name)
    if model_family(name, revision) != "clip":
        raise EvalError(
            f"model '{name}' is no CLIP model, and zero-shot classification needs one",
            "give a CLIP checkpoint",
        )
    model = load_checked(AutoModel, path, revision=revision)
    return (model.to(device) if device else model), load_clip_processor(path, revision)


def load_preparation(name: str, base: str | None = None) -> PromptPreparation | ChatPreparation:
    """Load what a checkpoint's processor and configuration make of a task, without its weights.

    Args:
        name: an embedded model's name, a folder, or a Hub id; of an adapter, its base is prepared for.
        base: of an adapter, where its base lies here; as the adapter says when None.

    Raises:
        EvalError: its processor cannot be loaded, or it is a model of no supported family.
    """
    # Seconds to import, which a check without a model doesn't need.
    from transformers import AutoConfig

    name, revision = adapter_base(name, base) or (name, None)
    path, family = resolve_model(name), model_family(name, revision)
    with loading(name):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        limit = config.get_text_config().max_position_embeddings
    if family == "llava":
        return ChatPreparation(load_chat_processor(path, revision), limit, MAX_NEW_TOKENS)
    return PromptPreparation.of(load_clip_processor(path, revision), config)
