"""A model and a processor that a Python program holds, in the place of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError, UserError
from llava_keeplora.models.base import Family
from llava_keeplora_eval.content import object_content, save_processor
from llava_keeplora_eval.processors import (
    check_image_tokens,
    check_vocabulary,
    with_pillow_videos,
    with_template,
)

PROCESSOR = "give AutoProcessor.from_pretrained of the checkpoint that the model comes from"
#: dtype of a model object → its name in a configuration.
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class GivenModel:
    """A model of transformers with its processor.

    A run freezes the model, moves it to its device, trains adapters on it, and gives it back with the weights
    that it had.

    Args:
        model: a `PreTrainedModel` without adapters, in float32 or bfloat16.
        processor: what makes its inputs; anything with an `image_processor` and a `tokenizer`.
    """

    model: Any
    processor: Any

    def describe(self, model: ModelConfig) -> ModelConfig:
        """Return what a run's configuration says of the object.

        Args:
            model: the model's section without the object.

        Raises:
            ConfigError: it is no whole model of one supported dtype, or the section does not go with it.
        """
        _check_model(self.model)
        kind = type(self.model).__name__
        dtypes = {p.dtype for p in self.model.parameters()}
        if len(dtypes) != 1 or not dtypes <= NAMES.keys():
            held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ConfigError(
                f"the given {kind} holds {held}, and a run computes in one of {', '.join(NAMES.values())}",
                "cast it with model.float() or model.to(torch.bfloat16)",
            )
        dtype = NAMES[dtypes.pop()]
        if model.quantization or model.dtype not in ("float32", dtype):
            key = "quantization" if model.quantization else "dtype"
            raise ConfigError(
                f"model.{key} is {getattr(model, key)}, and the given {kind} is in {dtype}, unquantised",
                f"leave model.{key} out, or name the checkpoint instead of giving a model",
            )
        if model.attn_implementation != ModelConfig.attn_implementation:
            raise ConfigError(
                f"model.attn_implementation is {model.attn_implementation}, and the given {kind} computes "
                "attention as it was loaded to",
                f"call its set_attn_implementation('{model.attn_implementation}'), and leave the key out",
            )
        return ModelConfig(
            name_or_path=getattr(self.model, "name_or_path", "") or kind,
            dtype=dtype,
            max_length=model.max_length,
            family=model.family,
            parts=model.parts,
            object=kind,
        )

    def content(self) -> dict[str, Any]:
        """Return the record of its content, by which a run that goes on refuses another model."""
        return object_content(self.model, self.processor)

    def save(self, folder: Path) -> None:
        """Write model and processor as a checkpoint."""
        self.model.save_pretrained(folder)
        save_processor(self.processor, folder)

    def load_into(self, family: Family, dtype: torch.dtype) -> None:
        """Set a family's model to this one, frozen, after comparing its tensors with those of a skeleton.

        Args:
            family: of the model's type.
            dtype: the model's.

        Raises:
            ConfigError: it has other tensors, as with adapters on it, or values that are no numbers.
        """
        family.skeleton(dtype)
        skeleton, state = family.model, self.model.state_dict()
        held, expected = ({k: v.shape for k, v in m.items()} for m in (state, skeleton.state_dict()))
        if differing := sorted(name for name, _ in {*held.items()} ^ {*expected.items()}):
            raise ConfigError(
                f"the given {type(self.model).__name__} differs from the {type(skeleton).__name__} of its "
                f"configuration in {len(differing)} tensors ({', '.join(differing[:2])})",
                "merge and unload adapters first, or give the whole model",
            )
        if bad := [name for name, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
            raise ConfigError(
                f"the given {type(self.model).__name__} holds NaN or infinity (in {len(bad)} tensors, first "
                f"{bad[0]})",
                "give a model whose training did not diverge",
            )
        family.model = self.model.eval().requires_grad_(False)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give the model back as it came, except for its device: mode, frozen tensors, `config.use_cache`.

        Weights are restored by who changes them.
        """
        model, config = self.model, vars(self.model.config)
        training, use_cache = model.training, {k: config[k] for k in ("use_cache",) if k in config}
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            yield
        finally:
            model.train(training)
            config.pop("use_cache", None)  # The Trainer sets it.
            config |= use_cache
            for name, p in model.named_parameters():
                p.requires_grad_(trainable.get(name, False))

    def clip_processor(self) -> Any:
        """Return the processor of a model of two encoders.

        Raises:
            ConfigError: it makes other inputs than the model takes.
        """
        self._check_parts()
        blank = self.processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        side = getattr(self.model.config.vision_config, "image_size", None)
        made = tuple(blank["pixel_values"].shape[2:])
        if isinstance(side, int) and len(made) == 2 and made != (side, side):
            raise ConfigError(
                f"the processor is not the model's: it makes images of {made[0]} × {made[1]} pixels, and "
                f"the model takes {side} × {side}",
                PROCESSOR,
            )
        return self.processor

    def chat_processor(self) -> Any:
        """Return the processor of a model that writes text, as a run of its checkpoint would have it.

        It gets its type's template where it has none, and takes videos by Pillow, as on every machine.

        Raises:
            ConfigError: it makes other inputs than the model takes.
        """
        self._check_parts()
        try:
            processor = with_template(self.processor, self.model.config, "the given processor")
            check_image_tokens(processor, self.model.config, "the given model")
        except UserError as error:
            raise ConfigError(f"the processor is not the model's: {error.problem}", PROCESSOR) from error
        return with_pillow_videos(processor, self.model.config)

    def _check_parts(self) -> None:
        kind, tokenizer = type(self.processor).__name__, getattr(self.processor, "tokenizer", None)
        if tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise ConfigError(
                f"the processor is a {kind}, and a run's has an image_processor and a tokenizer", PROCESSOR
            )
        try:
            check_vocabulary(tokenizer, "the given processor")
        except UserError as error:
            raise ConfigError(error.problem, PROCESSOR) from error
        largest = max(tokenizer.get_vocab().values())
        size = self.model.config.get_text_config().vocab_size
        if largest >= size:
            raise ConfigError(
                f"the processor is not the model's: its tokenizer has ids up to {largest}, and the model "
                f"takes those below {size}",
                PROCESSOR,
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not all(hasattr(model, n) for n in ("config", "save_pretrained")):
        raise ConfigError(
            f"model is a {type(model).__name__}, and a run takes a model of transformers",
            "give what from_pretrained returns, or name the checkpoint under model.name_or_path",
        )
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            "the given model is quantised already, and its base weights cannot be read again",
            "name the checkpoint and set model.quantization",
        )
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "the given model has weights that are not in memory, as with device_map", "load it whole"
        )
