"""Gradients and features of named linear layers; the only place that touches hooks and autograd."""

from llava_keeplora.capture.passes import autocast, autocast_dtype, feature_pass, gradient_pass
from llava_keeplora.capture.taps import feature_taps, gradient_taps, shared_inputs

__all__ = ["autocast", "autocast_dtype", "feature_pass", "feature_taps", "gradient_pass", "gradient_taps", "shared_inputs"]
