"""The untouched pre-trained model, the first row of every table.

Source of CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020. One prompt per class is used, as in
MTIL; CLIP's paper uses ensembles of prompts.
"""

from __future__ import annotations

from llava_keeplora.methods.base import Method, MethodInfo


class ZeroShot(Method):
    """The untouched model: nothing is trained, and nothing is stored."""

    trainable = False
    info = MethodInfo(
        "zero-shot", "the pre-trained model, untouched", "https://arxiv.org/abs/2103.00020", trained="nothing"
    )
