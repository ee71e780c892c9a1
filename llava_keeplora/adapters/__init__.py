"""PEFT LoRA on named linear layers, and the list of rank-r deltas that a run keeps."""

from llava_keeplora.adapters.deltas import BaseWeights, Delta, FullDelta, load_deltas, save_deltas
from llava_keeplora.adapters.lora import AdapterInit, attach, detach, read_adapters

__all__ = ["AdapterInit", "BaseWeights", "Delta", "FullDelta", "attach", "detach", "load_deltas", "read_adapters", "save_deltas"]
