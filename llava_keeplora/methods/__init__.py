"""The methods, an explicit list; one file each."""

from __future__ import annotations

from llava_keeplora.methods.base import Holding, Layer, Method, Record, TaskContext
from llava_keeplora.methods.iap import Iap
from llava_keeplora.methods.inflora import InfLora
from llava_keeplora.methods.keeplora import KeepLora
from llava_keeplora.methods.keeplora_plus import KeepLoraPlus
from llava_keeplora.methods.keeplora_plus_plus import KeepLoraPlusPlus
from llava_keeplora.methods.layers import Changed, check_method, find_changed, find_layers
from llava_keeplora.methods.moe_adapters import MoeAdapters
from llava_keeplora.methods.o_lora import OLora
from llava_keeplora.methods.reference import Reference
from llava_keeplora.methods.sd_lora import SdLora
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.methods.zero_shot import ZeroShot
from llava_keeplora.methods.zscl import Zscl

METHODS: dict[str, type[Method]] = {
    method.record.name: method
    for method in (ZeroShot, SequentialLora, KeepLora, KeepLoraPlus, KeepLoraPlusPlus, OLora, InfLora, SdLora, Zscl, MoeAdapters, Iap)
}

__all__ = ["METHODS", "Changed", "Holding", "Layer", "Method", "Record", "Reference", "TaskContext", "check_method", "find_changed", "find_layers"]
