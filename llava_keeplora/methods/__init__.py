"""The continual-learning methods, one file each; `llava_keeplora.registries` lists them by name."""

from __future__ import annotations

from llava_keeplora.methods.base import AnswerContext, Holding, Layer, Method, MethodInfo, TaskContext
from llava_keeplora.methods.layers import Changed, check_method, find_changed, find_layers, model_type
from llava_keeplora.methods.mixture import Mixture
from llava_keeplora.methods.reference import Reference
from llava_keeplora.registries import METHODS

__all__ = [
    "METHODS",
    "AnswerContext",
    "Changed",
    "Holding",
    "Layer",
    "Method",
    "MethodInfo",
    "Mixture",
    "Reference",
    "TaskContext",
    "check_method",
    "find_changed",
    "find_layers",
    "model_type",
]
