"""How a model is loaded and asked by plain transformers, for the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Usage of a model outside of this package, with an example from a task.

    Args:
        family: the family's name, a tag of the card.
        auto_class: the class of transformers that loads the model.
        pipeline_tag: the Hub's name of what the model does.
        served_by_vllm: whether vLLM serves LoRA adapters of the model.
        example: lines of Python that make an answer of `model`, `processor` and `image` and print it.
    """

    family: str
    auto_class: str
    pipeline_tag: str
    served_by_vllm: bool
    example: Sequence[str]


def classification_usage(
    family: str, auto_class: str, captions: Sequence[str], padding: Mapping[str, Any]
) -> Usage:
    """Return the usage of a model that chooses between captions, padded by these arguments."""
    padded = ", ".join(f"{name}={value!r}" for name, value in padding.items())
    example = (
        f"captions = {list(captions)!r}",
        f'inputs = processor(images=image, text=captions, {padded}, return_tensors="pt")',
        "print(captions[model(**inputs).logits_per_image.argmax().item()])",
    )
    return Usage(family, auto_class, "zero-shot-image-classification", False, example)


def generation_usage(
    family: str,
    auto_class: str,
    prompt: str,
    images: int,
    begun: bool,
    served: bool,
    videos: Sequence[int] = (),
) -> Usage:
    """Return the usage of a model that writes an answer to a prompt.

    Args:
        family, auto_class: see `Usage`.
        prompt: the chat text of a question.
        images: how many images it has places for.
        served: whether vLLM serves adapters of the model.
        videos: how many frames each of its videos has.
        begun: whether it begins with the begin-of-text token, which the processor must not add again.
    """
    media = [f"images={'image' if images < 2 else f'[image] * {images}'}"] if images else []
    if videos:
        frames = ", ".join(f"[image] * {count}" for count in videos)
        media += [f"videos=[{frames}], do_sample_frames=False"]
    shown = ", ".join(media)
    begin = "add_special_tokens=False, " if begun else ""
    example = (
        f"prompt = {prompt!r}",
        f'inputs = processor({shown}, text=prompt, {begin}return_tensors="pt").to(model.dtype)',
        "tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)",
        'answer = tokens[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode(answer, skip_special_tokens=True))",
    )
    return Usage(family, auto_class, "image-text-to-text", served, example)
