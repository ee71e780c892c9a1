"""Prompts that an attention reads besides its own keys and values, and gates for them.

Gates open or close prompts picture by picture.

Legend: b examples, s tokens, d width, m prompts, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, scaled_dot_product_attention


class Prompts(nn.Module):
    """P_k, uniform in (−1, 1) at the start, and P_v, zero: softmax(Q P_kᵀ / √head width) P_v, head by head.

    Args:
        width: d.
        length: m.
        heads: of the attention.
    """

    def __init__(self, width: int, length: int, heads: int):
        super().__init__()
        self.heads = heads
        self.keys = nn.Parameter(torch.empty(length, width).uniform_(-1.0, 1.0))
        self.values = nn.Parameter(torch.zeros(length, width))

    def forward(self, queries: Tensor) -> Tensor:
        """What the prompts add to the attention's output (b, s, d), given its queries (b, s, d)."""
        by_head = queries.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = (
            p.to(queries.dtype)
            .unflatten(-1, (self.heads, -1))
            .transpose(0, 1)
            .expand(len(queries), -1, -1, -1)
            for p in (self.keys, self.values)
        )
        return scaled_dot_product_attention(by_head, keys, values).transpose(1, 2).flatten(2)


class Gate(nn.Linear):
    """Whether a layer's prompts are open for a picture: closed or open by two logits of its features.

    Args:
        width: p.
        temperature: of the Gumbel softmax through which it learns.
    """

    def __init__(self, width: int, temperature: float):
        super().__init__(width, 2)
        self.temperature = temperature
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, image: Tensor) -> Tensor:
        """1 or 0 for each picture (b,): drawn in training, with the gradient of the soft choice.

        The likelier one else.

        Args:
            image: (b, p).
        """
        with torch.autocast(image.device.type, enabled=False):
            logits = nn.functional.linear(image.float(), self.weight.float(), self.bias.float())
            if self.training:
                return gumbel_softmax(logits, tau=self.temperature, hard=True)[:, 1]
            return logits.argmax(dim=1).float()


@contextmanager
def prompted(
    attentions: Sequence[nn.Module],
    prompts: Sequence[Prompts],
    factors: Callable[[int], Tensor | float | None],
) -> Iterator[None]:
    """Have attentions add their prompts' part before the output projection while the block runs.

    Args:
        attentions: of an encoder.
        prompts: one for each of the first of them.
        factors: the number of an attention → what its part is multiplied by, one for all examples or one for
            each (b,); None for no part at all.
    """
    with ExitStack() as held:
        for number, own in enumerate(prompts):
            for hook in _reading(attentions[number], own, number, factors):
                held.callback(hook.remove)
        yield


def _reading(
    attention: nn.Module, own: Prompts, number: int, factors: Callable[[int], Tensor | float | None]
) -> tuple:
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        read[:] = [output]

    def add(module: nn.Module, args: tuple) -> tuple | None:
        factor, queries = factors(number), read.pop()
        if factor is None:
            return None
        if isinstance(factor, Tensor):
            factor = factor.to(args[0].dtype)[:, None, None]
        return (args[0] + factor * own(queries), *args[1:])

    return attention.q_proj.register_forward_hook(keep), attention.out_proj.register_forward_pre_hook(add)
