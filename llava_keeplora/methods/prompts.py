"""Prompts that an attention reads in addition to its own keys and values, and gates per image for them.

Legend: b examples, s tokens, d width, m prompts, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, scaled_dot_product_attention


class Prompts(nn.Module):
    """Prompts of one attention: softmax(Q P_kᵀ / √head width) P_v, head by head.

    P_k starts uniform in (−1, 1) and P_v at zero.

    Args:
        width: d.
        length: m.
        heads: number of heads of the attention.
    """

    def __init__(self, width: int, length: int, heads: int):
        super().__init__()
        self.heads = heads
        self.keys = nn.Parameter(torch.empty(length, width).uniform_(-1.0, 1.0))
        self.values = nn.Parameter(torch.zeros(length, width))

    def forward(self, queries: Tensor) -> Tensor:
        """Return what the prompts add to the attention's output (b, s, d), given its queries (b, s, d)."""
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
    """Gate of a layer's prompts: two logits of an image's features decide between closed (0) and open (1).

    Args:
        width: p.
        temperature: temperature of the Gumbel softmax that samples it in training.
    """

    def __init__(self, width: int, temperature: float):
        super().__init__(width, 2)
        self.temperature = temperature
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return 1 or 0 for each image (b,).

        In training it is sampled, with the gradient of the soft choice; else it is the likelier of the two.

        Args:
            image: features (b, p).
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
    """Add the prompts' outputs to attentions, before the output projection, while the block runs.

    Args:
        attentions: the attentions of an encoder.
        prompts: prompts of the first of them, in order.
        factors: number of an attention → the factor on its prompts' output, one for all examples or one each
            (b,); None to leave the prompts out.
    """
    with ExitStack() as hooks:
        for number, of_layer in enumerate(prompts):
            for hook in _add_to_attention(attentions[number], of_layer, number, factors):
                hooks.callback(hook.remove)
        yield


def _add_to_attention(
    attention: nn.Module, prompts: Prompts, number: int, factors: Callable[[int], Tensor | float | None]
) -> tuple:
    kept_queries: list[Tensor] = []

    def keep_queries(module: nn.Module, args: tuple, output: Tensor) -> None:
        kept_queries[:] = [output]

    def add(module: nn.Module, args: tuple) -> tuple | None:
        factor, queries = factors(number), kept_queries.pop()
        if factor is None:
            return None
        if isinstance(factor, Tensor):
            factor = factor.to(args[0].dtype)[:, None, None]
        return (args[0] + factor * prompts(queries), *args[1:])

    return (
        attention.q_proj.register_forward_hook(keep_queries),
        attention.out_proj.register_forward_pre_hook(add),
    )
