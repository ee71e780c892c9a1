"""Where the parts of image-text-to-text models lie: a record of a few lines for each model type.

Module names are those of transformers 5, which has no `vision_model` level inside vision towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llava_keeplora.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Tower:
    """Blocks of a vision encoder.

    Args:
        blocks: dotted name of the list of blocks, below the encoder.
        targets: leaf names of the linear layers that are adapted by default. A fused `qkv` is one layer with
            one input.
    """

    blocks: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Parts of a model type.

    Args:
        vision: dotted name of the vision encoder.
        connector: dotted prefix of what maps its features into the language model.
        targets: leaf names of the connector's linear layers that are adapted by default; none where it has
            no linear layer.
        language: dotted prefix of the language model's blocks.
        unquantized: dotted names of what stays unquantised, as LLaVA's own recipes leave the connector; the
            connector's prefix where none is given.
        served: whether vLLM loads adapters of the type: its class for it supports LoRA, as of 0.33.
    """

    vision: str
    connector: str
    targets: tuple[str, ...]
    language: str = "model.language_model.layers"
    unquantized: tuple[str, ...] = ()
    served: bool = True


#: Type of a vision encoder's configuration → its blocks.
TOWERS: Mapping[str, Tower] = {
    "clip_vision_model": Tower("encoder.layers", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "siglip_vision_model": Tower("encoder.layers", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "pixtral": Tower("transformer.layers", ATTENTION),
    "qwen2_vl_vision": Tower("blocks", ("qkv", "proj")),
    "qwen2_5_vl_vision": Tower("blocks", ("qkv", "proj")),
    "qwen3_vl_vision": Tower("blocks", ("qkv", "proj")),
    "internvl_vision": Tower("encoder.layer", ("q_proj", "k_proj", "v_proj", "projection_layer")),
    "idefics3_vision": Tower("encoder.layers", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "smolvlm_vision": Tower("encoder.layers", ("q_proj", "k_proj", "v_proj", "out_proj")),
}

_LLAVA = Layout("model.vision_tower", "model.multi_modal_projector", ("linear_1", "linear_2"))
_UNSERVED = replace(_LLAVA, served=False)
# The connector is all of the encoder but its blocks, which are the vision part's: the longer prefix wins.
_QWEN2 = Layout("model.visual", "model.visual", ("0", "2"), unquantized=("model.visual.merger",))

#: Type of a model's configuration → its parts.
LAYOUTS: Mapping[str, Layout] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _UNSERVED,
    "vipllava": _UNSERVED,  # vLLM has no class for it
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": Layout(
        "model.visual",
        "model.visual",
        ("linear_fc1", "linear_fc2"),
        unquantized=("model.visual.merger", "model.visual.deepstack_merger_list"),
    ),
    "internvl": _LLAVA,
    "paligemma": Layout("model.vision_tower", "model.multi_modal_projector", ("linear",)),
    # Gemma 3 projects by a bare parameter, so it has no connector part.
    "gemma3": Layout("model.vision_tower", "model.multi_modal_projector", ()),
    "idefics3": Layout("model.vision_model", "model.connector", ("proj",), "model.text_model.layers"),
    "smolvlm": Layout("model.vision_model", "model.connector", ("proj",), "model.text_model.layers"),
}


@dataclass(frozen=True)
class Parts:
    """Parts of one model.

    Args:
        prefixes: part → dotted prefix of its layers.
        targets: part → leaf names of the linear layers that are adapted by default.
        unquantized: dotted prefixes of what stays unquantised.
    """

    prefixes: Mapping[str, str]
    targets: Mapping[str, tuple[str, ...]]
    unquantized: tuple[str, ...]


def find_parts(config, path: str, prefixes: Mapping[str, str] | None = None) -> Parts:
    """Return the parts of a model by its configuration.

    Args:
        config: of transformers, with a `vision_config`.
        path: the model, for the error.
        prefixes: part → dotted prefix, as a run's configuration gives them for a model of a type that is not
            known; its default targets are the language model's usual ones.

    Raises:
        ConfigError: a type that is not known, without prefixes.
    """
    layout = LAYOUTS.get(config.model_type)
    encoder = getattr(getattr(config, "vision_config", None), "model_type", "")
    if prefixes:
        return Parts(
            dict(prefixes),
            {"language": ATTENTION + GATED_MLP},
            tuple(filter(None, [prefixes.get("connector")])),
        )
    if layout is None or encoder not in TOWERS:
        raise ConfigError(
            f"where the parts of a '{config.model_type}' model with a '{encoder}' encoder lie is not known "
            f"({path})",
            "name them under model.parts, such as `{language: model.language_model.layers}`",
        )
    tower = TOWERS[encoder]
    found = {"vision": f"{layout.vision}.{tower.blocks}", "connector": layout.connector}
    targets = {"vision": tower.targets, "connector": layout.targets}
    if not layout.targets:
        del found["connector"], targets["connector"]
    return Parts(
        found | {"language": layout.language},
        targets | {"language": ATTENTION + GATED_MLP},
        layout.unquantized or (layout.connector,),
    )


def part_of(name: str, parts: Mapping[str, str]) -> str | None:
    """Return the part that a module belongs to, of nested prefixes the longest; None outside of all."""
    inside = [part for part, prefix in parts.items() if name.startswith(prefix + ".")]
    return max(inside, key=lambda part: len(parts[part]), default=None)
