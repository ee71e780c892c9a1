"""The pre-trained model as it is: the first row of every table (CLIP: Radford et al. 2021, arXiv 2103.00020).

One prompt per class, where CLIP's paper has ensembles of them; so does MTIL.
"""

from __future__ import annotations

from llava_keeplora.methods.base import Method, MethodInfo


class ZeroShot(Method):
    """Nothing is trained, nothing is stored."""

    trainable = False
    info = MethodInfo(
        "zero-shot", "the pre-trained model, untouched", "https://arxiv.org/abs/2103.00020", trained="nothing"
    )
