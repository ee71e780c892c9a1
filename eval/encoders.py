"""Models of two encoders, one for images and one for texts, by the type that their configuration names.

What their types differ in is a record here; everything else is asked of the model, its configuration, its
tokenizer and its image processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Leaf names of the attention projections of CLIP's layers, and of BERT's without the output projection,
#: whose leaf name `dense` those of the MLP have too.
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
BERT_ATTENTION = ("query", "key", "value")

VISION, TEXT = "vision_model.encoder.layers", "text_model.encoder.layers"


@dataclass(frozen=True)
class Encoders:
    """What distinguishes a type of model with two encoders.

    Args:
        parts: part → dotted prefix of its layers.
        targets: part → leaf names of the linear layers that are adapted where a configuration names none.
        skip_quantization: dotted prefixes of what stays unquantised where the base is quantised: projections,
            and layers whose weight is read without calling them, such as those in an `nn.MultiheadAttention`.
        padding: of class prompts, by the tokenizers' names: to the `longest`, or to the text encoder's
            `max_length`, as models are asked that were trained so.
        text_inputs: what the text encoder takes of a tokenizer's output, where the tokenizer gives it.
        causal: whether a token of a text attends to earlier ones alone.
        reserved_positions: how many of the text encoder's positions no token has.
        keeps_shape: whether images keep their shape, and are not scaled or cut to one size.
    """

    parts: Mapping[str, str]
    targets: Mapping[str, tuple[str, ...]]
    skip_quantization: tuple[str, ...] = ("visual_projection", "text_projection")
    padding: str = "longest"
    text_inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    causal: bool = False
    reserved_positions: int = 0
    keeps_shape: bool = False

    def max_tokens(self, config) -> int:
        """Return the most tokens that the text encoder of a configuration takes."""
        return int(config.text_config.max_position_embeddings) - self.reserved_positions


CLIP = Encoders(
    {"vision": VISION, "text": TEXT}, {"vision": CLIP_ATTENTION, "text": CLIP_ATTENTION}, causal=True
)

#: Model type → its record. SigLIP 2 of a fixed resolution has SigLIP's type.
ENCODERS: Mapping[str, Encoders] = {
    "clip": CLIP,
    "siglip": Encoders(
        CLIP.parts,
        CLIP.targets,
        skip_quantization=("vision_model.head", "text_model.head"),
        padding="max_length",
    ),
    "siglip2": Encoders(
        CLIP.parts,
        CLIP.targets,
        # Its patches go through a linear layer, whose weight says which dtype they are cast to.
        skip_quantization=("vision_model.embeddings", "vision_model.head", "text_model.head"),
        padding="max_length",
        keeps_shape=True,
    ),
    "chinese_clip": Encoders(
        {"vision": VISION, "text": "text_model.encoder.layer"},
        {"vision": CLIP_ATTENTION, "text": BERT_ATTENTION},
        text_inputs=("input_ids", "attention_mask", "token_type_ids"),
    ),
    "altclip": Encoders(
        {"vision": VISION, "text": "text_model.roberta.encoder.layers"},
        {"vision": CLIP_ATTENTION, "text": BERT_ATTENTION},
        skip_quantization=("visual_projection", "text_projection", "text_model.transformation"),
        # XLM-RoBERTa counts a text's positions from behind that of padding, which is 1.
        reserved_positions=2,
    ),
    "metaclip_2": CLIP,
}


def find_encoders(config) -> Encoders:
    """Return the record of a model's type; that of CLIP with no parts for a type that has none.

    Args:
        config: the model's, of transformers.
    """
    unknown = Encoders({}, {}, skip_quantization=())
    return ENCODERS.get(config.model_type, unknown)


def feature_width(config) -> int | None:
    """Return the width of both encoders' features; None where a configuration does not say it."""
    width = getattr(config, "projection_dim", None)
    return width or getattr(config.text_config, "projection_size", None)
