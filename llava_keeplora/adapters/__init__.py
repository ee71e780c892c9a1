"""PEFT LoRA on named linear layers, and the list of rank-r deltas that a run keeps."""

from llava_keeplora.adapters.base import BaseWeights
from llava_keeplora.adapters.combine import compress, concatenate, pad
from llava_keeplora.adapters.deltas import Delta, FullDelta, load_deltas, save_deltas
from llava_keeplora.adapters.lora import AdapterInit, attach, detach, read_adapters
from llava_keeplora.adapters.weights import dense_weight, is_quantised

__all__ = [
    "AdapterInit", "BaseWeights", "Delta", "FullDelta", "attach", "compress", "concatenate", "dense_weight", "detach",
    "is_quantised", "load_deltas", "pad", "read_adapters", "save_deltas",
]
