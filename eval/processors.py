"""The processor of any image-text-to-text checkpoint, put together without torchvision.

Image processors are the ones by Pillow, whatever is installed, so that a model sees the same pixels
everywhere. So are video processors (`video_inputs.py`), which transformers has with torchvision only; a
processor of another type that wants one does without, and frames of a video are shown as images.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from llava_keeplora_eval.chat_text import VICUNA_V1
from llava_keeplora_eval.checkpoints import AGAIN, loading
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.video_inputs import PillowVideos, pillow_videos

#: For checkpoints without a chat template, of types that had none at first: model type → template, in which
#: `<image>` stands for an image.
TEMPLATES = {
    "llava": VICUNA_V1,
    "llava_next": VICUNA_V1,
    "llava_onevision": VICUNA_V1,
    # Of llava-hf/vip-llava-7b-hf.
    "vipllava": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions."
        "{% for message in messages %}###{{ 'Human' if message['role'] == 'user' else 'Assistant' }}: "
        "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
    ),
    # The processor adds the begin token after the images and a line break after the question.
    "paligemma": (
        "{% if messages | length > 1 and add_generation_prompt %}"
        "{{ raise_exception('PaliGemma answers single questions') }}{% endif %}"
        "{% for item in messages[0]['content'] if item['type'] == 'image' %}<image>{% endfor %}"
        "{% for item in messages[0]['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    ),
}


def load_chat_processor(path: str, revision: str | None = None):
    """Load the processor of an image-text-to-text checkpoint.

    Settings that its files lack are taken from the model's configuration.

    Args:
        path: a folder or a Hub id.
        revision: the Hub revision.

    Raises:
        EvalError: it cannot be loaded, or belongs to another model.
    """
    # Seconds to import, which the other commands don't need.
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    source = {"revision": revision, "trust_remote_code": False}
    with loading(path):
        config = AutoConfig.from_pretrained(path, **source)
        cls = _processor_class(path, revision, config.model_type)
        settings, _ = cls.get_processor_dict(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        known = inspect.signature(cls.__init__).parameters
        chosen = _missing_settings(config, known) | {
            key: value for key, value in settings.items() if key in known and value is not None
        }
        chosen = {key: value for key, value in chosen.items() if key not in PARTS}
        chosen["chat_template"] = chosen.get("chat_template") or getattr(tokenizer, "chat_template", None)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **source)
        if config.model_type == "paligemma" and not hasattr(image_processor, "image_seq_length"):
            image_processor.image_seq_length = config.vision_config.num_image_tokens
        videos = pillow_videos(config.model_type, _video_settings(path, revision))
        processor = _with_videos(cls, videos)(image_processor=image_processor, tokenizer=tokenizer, **chosen)
    processor = with_template(processor, config, path)
    check_vocabulary(tokenizer, path)
    check_image_tokens(processor, config, path)
    return processor


def with_template(processor, config, path: str):
    """Return a processor with a chat template: its own, its tokenizer's, or that of the model's type.

    Args:
        processor: left as it is.
        config: the model's.
        path: of the checkpoint, for the error.

    Raises:
        EvalError: there is none.
    """
    template = (
        processor.chat_template
        or getattr(processor.tokenizer, "chat_template", None)
        or TEMPLATES.get(config.model_type)
    )
    if template is None:
        raise EvalError(
            f"'{path}' has no chat template, so how a '{config.model_type}' model is asked is unknown",
            "add its chat_template.jinja, or the chat_template of its tokenizer_config.json",
        )
    if template == processor.chat_template:
        return processor
    changed = copy.copy(processor)
    changed.chat_template = template
    return changed


def with_pillow_videos(processor, config):
    """Return a processor that takes videos by Pillow, with the settings of its own video processor.

    It is returned as it is where it has none of its own, or settings that are not done here; frames of a
    video are then images to it.

    Args:
        processor: left as it is.
        config: the model's.
    """
    own = getattr(processor, "video_processor", None)
    if own is None or isinstance(own, (PillowVideos, NoVideoProcessor)):
        return processor
    videos = pillow_videos(config.model_type, own.to_dict())
    if videos is None:
        return processor
    changed = copy.copy(processor)
    changed.video_processor = videos
    return changed


#: What a processor is put together of.
PARTS = ("image_processor", "tokenizer", "video_processor", "feature_extractor", "audio_processor")


def _processor_class(path: str, revision: str | None, model_type: str) -> Any:
    """Return the class of a checkpoint's processor: the one that its files name, or its type's own."""
    import transformers
    from transformers.models.auto.image_processing_auto import get_image_processor_config
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # In the order in which transformers asks these files.
    name = (
        transformers.ProcessorMixin.get_processor_dict(path, revision=revision)[0].get("processor_class")
        or get_image_processor_config(path, revision=revision).get("processor_class")
        or get_tokenizer_config(path, revision=revision).get("processor_class")
    )
    name = name or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name == "PixtralProcessor":
        return _pixtral_processor()
    cls = getattr(transformers, name, None) if name else None
    if not inspect.isclass(cls) or not issubclass(cls, transformers.ProcessorMixin):
        raise EvalError(f"the processor class '{name}' of '{path}' is not known to transformers", AGAIN)
    return cls


def _pixtral_processor() -> Any:
    """Return Pixtral's processor, whose file imports a helper from the image processor by torchvision."""
    package, helper = "transformers.models.pixtral", "image_processing_pil_pixtral"
    if importlib.util.find_spec("torchvision") is None:
        # The same helper is in the image processor by Pillow.
        sys.modules.setdefault(
            f"{package}.image_processing_pixtral", importlib.import_module(f"{package}.{helper}")
        )
    return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor


@dataclass(frozen=True)
class NoVideoProcessor:
    """A stand-in for a video processor, with what processors ask of one even where there is no video."""

    num_frames: None = None
    fps: None = None
    model_input_names: tuple[str, ...] = ()
    _auto_class: ClassVar[None] = None


def _video_settings(path: str, revision: str | None) -> dict[str, Any]:
    """Return what a checkpoint's files say of its video processor, or else of its image processor."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config
    from transformers.models.auto.video_processing_auto import get_video_processor_config

    # In the order in which transformers asks these files.
    named = get_video_processor_config(path, revision=revision)
    return named or get_image_processor_config(path, revision=revision)


def _with_videos(cls: Any, videos: PillowVideos | None) -> Any:
    """Return a processor's class with a video processor, or with a stand-in for one where there is none."""
    if "video_processor" not in inspect.signature(cls.__init__).parameters:
        return cls

    def check_argument_for_proper_class(self, argument_name, argument):
        if not isinstance(argument, (NoVideoProcessor, PillowVideos)):
            return cls.check_argument_for_proper_class(self, argument_name, argument)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's settings, those of videos too; `save_pretrained` writes them."""
        stand_in = vars(self).pop("video_processor")
        try:
            content = cls.to_dict(self)
        finally:
            self.video_processor = stand_in
        return content | ({"video_processor": dict(stand_in.settings)} if videos else {})

    members = {
        "check_argument_for_proper_class": check_argument_for_proper_class,
        "to_dict": to_dict,
        "__module__": cls.__module__,
    }
    return partial(type(cls.__name__, (cls,), members), video_processor=videos or NoVideoProcessor())


def _missing_settings(config, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's configuration says of the settings of its processor.

    Args:
        config: the model's.
        known: the settings that the processor's class knows.
    """
    vision = config.vision_config
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    rules: dict[str, Callable[[], Any]] = {
        "patch_size": lambda: patch,
        "vision_feature_select_strategy": lambda: config.vision_feature_select_strategy,
        "num_additional_image_tokens": lambda: int(vision.model_type == "clip_vision_model"),
        "num_image_tokens": lambda: (side // patch) ** 2,
        "vision_aspect_ratio": lambda: config.vision_aspect_ratio,
        "image_seq_length": lambda: config.image_seq_length,
        "image_seq_len": lambda: (side // patch) ** 2 // config.scale_factor**2,
        "spatial_merge_size": lambda: config.spatial_merge_size,
    }
    settings = {}
    for key in rules.keys() & known.keys():
        try:
            settings[key] = rules[key]()
        except (AttributeError, TypeError):  # The class has a default of its own.
            continue
    return {key: value for key, value in settings.items() if value is not None}


def check_vocabulary(tokenizer, path: str) -> None:
    """Refuse a tokenizer without words.

    transformers makes one where a checkpoint's tokenizer files are missing.

    Raises:
        EvalError: naming the checkpoint.
    """
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) == 0:
        raise EvalError(
            f"the tokenizer of '{path}' has no words: its files (tokenizer.json, or vocab.json and "
            "merges.txt) are not there",
            AGAIN,
        )


def check_image_tokens(processor, config, path: str) -> None:
    """Refuse a processor that makes other image tokens than its model takes.

    Raises:
        EvalError: naming what differs.
    """
    vision = config.vision_config
    written = getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id
    for name, made, taken in (
        ("image token", written, getattr(config, "image_token_id", None)),
        ("patch_size", getattr(processor, "patch_size", None), getattr(vision, "patch_size", None)),
        (
            "vision_feature_select_strategy",
            getattr(processor, "vision_feature_select_strategy", None),
            getattr(config, "vision_feature_select_strategy", None),
        ),
    ):
        if made is not None and taken is not None and made != taken:
            raise EvalError(
                f"the processor of '{path}' has the {name} {made}, and its config.json {taken}", AGAIN
            )
    depth = getattr(vision, "num_hidden_layers", None)
    for layer in feature_layers(config) if depth else ():
        if not -depth - 1 <= layer <= depth:
            raise EvalError(
                f"the config.json of '{path}' has the vision_feature_layer {layer}, and its vision encoder "
                f"{depth} layers",
                AGAIN,
            )


def feature_layers(config) -> list[int]:
    """Return the indices of the vision encoder's hidden states that the connector reads, where set."""
    chosen = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    return list(chosen) if isinstance(chosen, (list, tuple)) else [chosen] if chosen is not None else []
