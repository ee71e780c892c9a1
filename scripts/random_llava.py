"""LLaVA models of any size with random weights, and batches for them, for benchmarks of speed and memory.

The architecture is LLaVA-1.5's (Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024):
a CLIP vision tower, a projector of two layers, and a Llama. Random weights take as much time and memory as
trained ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_keeplora.models.layouts import ATTENTION, GATED_MLP, LAYOUTS
from llava_keeplora.models.linear_layers import find_linear_layers

IMAGE, IGNORE = 4, -100
# Standard deviation of the weights: Llama's `initializer_range`.
SPREAD = 0.02


@dataclass(frozen=True)
class Size:
    """Widths and depths of a LLaVA; the defaults are LLaVA-1.5-7B's (CLIP ViT-L/14 at 336 pixels, Vicuna-7B).

    Args:
        hidden, intermediate, layers, heads, vocabulary: sizes of the language model.
        vision_hidden, vision_intermediate, vision_layers, vision_heads: sizes of the vision tower.
        image, patch: side of an image and of a patch, in pixels.
    """

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32064
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image: int = 336
    patch: int = 14

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.image // self.patch) ** 2

    def scaled(self, share: float) -> "Size":
        """Return a copy scaled to a share of widths, depths and image; head width and patch are kept."""

        def times(number: int, unit: int = 1) -> int:
            return unit * max(1, round(number * share / unit))

        head, vision_head = self.hidden // self.heads, self.vision_hidden // self.vision_heads
        return Size(
            hidden=times(self.hidden, head),
            intermediate=times(self.intermediate, 32),
            layers=times(self.layers),
            heads=times(self.hidden, head) // head,
            vocabulary=times(self.vocabulary, 64),
            vision_hidden=times(self.vision_hidden, vision_head),
            vision_intermediate=times(self.vision_intermediate, 32),
            vision_layers=max(2, times(self.vision_layers)),
            vision_heads=times(self.vision_hidden, vision_head) // vision_head,
            image=max(2 * self.patch, times(self.image, self.patch)),
            patch=self.patch,
        )


def _llava_config(size: Size) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=size.vision_intermediate,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image,
        patch_size=size.patch,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=size.image_tokens
    )


def random_llava(
    size: Size,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    convert: Callable[[nn.Module], None] = lambda module: None,
) -> LlavaForConditionalGeneration:
    """Create a frozen LLaVA with Gaussian weights, tensor by tensor, so that only the result is in memory.

    Args:
        size: its widths and depths.
        dtype: dtype of the weights.
        device: device of the weights.
        convert: called with each decoder layer of the language model as soon as it has its weights, for
            instance to quantise it.
    """
    config = _llava_config(size)
    with torch.device("meta"):
        model = (
            LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
            .eval()
            .requires_grad_(False)
        )
    generator = torch.Generator(device).manual_seed(0)
    layers = set(model.model.language_model.layers)

    def fill(module: nn.Module) -> None:
        for child in module.children():
            fill(child)
        for name, p in module.named_parameters(recurse=False):
            value = torch.empty(p.shape, dtype=dtype, device=device)
            if p.dim() > 1:
                value.normal_(0.0, SPREAD, generator=generator)
            else:
                # Norms are the identity.
                value.fill_(float("norm" in type(module).__name__.lower() and name == "weight"))
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, _buffer(module, name, config, device), persistent=False)
        if module in layers:
            convert(module)

    fill(model)
    return model


def _buffer(module: nn.Module, name: str, config: LlavaConfig, device: torch.device | str) -> Tensor:
    """Return the values of a module's buffer: positions, or the frequencies of rotary embeddings."""
    if name == "position_ids":
        return torch.arange(module.num_positions, device=device).expand(1, -1)
    head = config.text_config.hidden_size // config.text_config.num_attention_heads
    theta = config.text_config.rope_parameters["rope_theta"]
    return 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)


def random_batch(
    size: Size, images: int, text: int, answer: int, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return a batch of one image per example, padded on the right.

    Up to `text` tokens follow the image, of which the last `answer` are learned.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        IMAGE + 1, size.vocabulary, (images, size.image_tokens + text), generator=generator
    )
    tokens[:, : size.image_tokens] = IMAGE
    labels, mask = torch.full_like(tokens, IGNORE), torch.ones_like(tokens)
    for row in range(images):
        # Questions differ in length: from all of the text down to three quarters of it.
        end = size.image_tokens + text - row * text // (4 * images)
        labels[row, end - answer : end] = tokens[row, end - answer : end]
        tokens[row, end:] = mask[row, end:] = 0
    batch = {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": labels,
        "image_rows": torch.ones(images, 1, dtype=torch.long),
        "pixel_values": torch.randn(images, 3, size.image, size.image, generator=generator),
    }
    return {key: value.to(device) for key, value in batch.items()}


def language_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Full name → linear layer of the language model, 7 per decoder layer."""
    prefixes = {"language": LAYOUTS["llava"].language}
    return find_linear_layers(model, prefixes, "language", ATTENTION + GATED_MLP)
