"""Capture of gradients and features of named linear layers; the only package that uses hooks and autograd."""

from llava_keeplora.capture.hooks import feature_hooks, gradient_hooks, shared_inputs
from llava_keeplora.capture.passes import autocast, autocast_dtype, evaluating, feature_pass, gradient_pass

__all__ = [
    "autocast",
    "autocast_dtype",
    "evaluating",
    "feature_hooks",
    "feature_pass",
    "gradient_hooks",
    "gradient_pass",
    "shared_inputs",
]
