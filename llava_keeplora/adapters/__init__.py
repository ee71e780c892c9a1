"""PEFT LoRA on named linear layers, and the deltas, low-rank or full, that a task's training results in."""

from llava_keeplora.adapters.base import BaseWeights, merged_weight
from llava_keeplora.adapters.combine import compress, concatenate, pad, relative_error, singular_values
from llava_keeplora.adapters.deltas import Delta, Deltas, FullDelta, full_deltas, load_deltas, save_deltas
from llava_keeplora.adapters.lora import (
    ADAPTER,
    AdapterInit,
    attach,
    detach,
    freeze_A,
    insert_between,
    lora_layers,
    read_adapters,
    since_start,
)
from llava_keeplora.adapters.project import project_deltas, project_off, removed_energy
from llava_keeplora.adapters.weights import dense_weight, is_quantised

__all__ = [
    "ADAPTER",
    "AdapterInit",
    "BaseWeights",
    "Delta",
    "Deltas",
    "FullDelta",
    "attach",
    "compress",
    "concatenate",
    "dense_weight",
    "detach",
    "freeze_A",
    "full_deltas",
    "insert_between",
    "is_quantised",
    "load_deltas",
    "lora_layers",
    "merged_weight",
    "pad",
    "project_deltas",
    "project_off",
    "read_adapters",
    "relative_error",
    "removed_energy",
    "save_deltas",
    "since_start",
    "singular_values",
]
