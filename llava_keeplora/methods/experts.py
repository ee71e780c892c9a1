"""A mixture of adapters beside a layer's MLP: experts that all tasks share, and a router for every task.

Legend: b examples, s tokens, d width, E experts, k of them for an example, h bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu, softplus

#: The least spread of the noise on a router's scores (Shazeer et al. 2017, equation 4, as MoE-Adapters has
#: it).
LEAST_NOISE = 0.01


class Expert(nn.Module):
    """Two linear layers, d → h → d; the second one starts at zero.

    Args:
        width: d.
        bottleneck: h.
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)


class Router(nn.Module):
    """Scores of the experts for an example, and how far noise spreads them in training; both start at zero.

    Args:
        width: d.
        experts: E.
    """

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.score, self.spread = (nn.Parameter(torch.zeros(experts, width)) for _ in range(2))

    def forward(self, first: Tensor, top_k: int) -> Tensor:
        """Gates (b, E): softmax over the `top_k` best experts, 0 for the others.

        Args:
            first: (b, d), the example's first token.
            top_k: how many take part.
        """
        # In fp32 also under autocast: neighbouring scores decide who takes part.
        with torch.autocast(first.device.type, enabled=False):
            first = first.float()
            scores = linear(first, self.score.float())
            if self.training:
                scores = scores + torch.randn_like(scores) * (
                    softplus(linear(first, self.spread.float())) + LEAST_NOISE
                )
            best = scores.topk(top_k, dim=-1)
            return torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))


class Mixture(nn.Module):
    """One layer's experts and routers.

    Y = s Σ_e g_e (U_e drop(relu(D_e x + b_e)) + c_e), the same g for all tokens of an example.

    Examples of many tokens meet their own k experts alone, k of E of the work, by a product with their
    matrices side by side; for examples of few tokens such copies would be larger than what all experts give,
    so there all are computed. Either way every expert gets a gradient, one that nobody took of 0, so that no
    training step leaves one out.

    Args:
        width: d.
        experts: E.
        bottleneck: h.
        tasks: number of routers.
        top_k: experts per example.
        scale: s.
        dropout: on the bottleneck while training.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        bottleneck: int,
        tasks: int,
        top_k: int,
        scale: float,
        dropout: float,
    ):
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, bottleneck) for _ in range(experts))
        self.routers = nn.ModuleList(Router(width, experts) for _ in range(tasks))
        self.bottleneck, self.top_k, self.scale, self.dropout = bottleneck, top_k, scale, dropout
        #: (E,) how many examples each expert took part in, where somebody wants to know.
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor, task: int) -> Tensor:
        """What is added (b, s, d).

        Args:
            x: (b, s, d), what the layer's second norm reads.
            task: whose router.
        """
        gates = self.routers[task](x[:, 0], self.top_k)
        if self.training and self.chosen is not None:
            self.chosen += (gates > 0).sum(0)
        x, gates = (value.to(self.experts[0].down.weight.dtype) for value in (x, gates))
        few = x.shape[1] * len(self.experts) <= self.top_k * x.shape[2]
        return self.scale * (self._of_all(x, gates) if few else self._of_own(x, gates))

    def _of_all(self, x: Tensor, gates: Tensor) -> Tensor:
        """Σ_e g_e E_e(x) of all experts; those of gate 0 add nothing."""
        down, up = [e.down for e in self.experts], [e.up for e in self.experts]
        inner = self._gated(
            linear(x, torch.cat([one.weight for one in down]), torch.cat([one.bias for one in down])), gates
        )
        return (
            linear(inner, torch.cat([one.weight for one in up], dim=1))
            + (gates @ torch.stack([one.bias for one in up]))[:, None]
        )

    def _of_own(self, x: Tensor, gates: Tensor) -> Tensor:
        """The same by each example's own experts."""
        gates, taken = gates.topk(self.top_k, dim=-1)  # (b, k)

        def own(tensors: list[Tensor]) -> Tensor:
            """Index rows: (b, k, ...).

            Unlike that of `index_select`, the gradient of indexing is summed in one order on a GPU too.
            """
            return torch.stack(tensors)[taken]

        down, up = [e.down for e in self.experts], [e.up for e in self.experts]
        inner = torch.baddbmm(
            own([e.bias for e in down]).flatten(1)[:, None], x, own([e.weight for e in down]).flatten(1, 2).mT
        )  # (b, s, k h)
        return torch.bmm(self._gated(inner, gates), own([e.weight.mT for e in up]).flatten(1, 2)) + gates[
            :, None
        ] @ own([e.bias for e in up])

    def _gated(self, inner: Tensor, gates: Tensor) -> Tensor:
        return (
            dropout(relu(inner), self.dropout, self.training)
            * gates.repeat_interleave(self.bottleneck, dim=1)[:, None]
        )


@contextmanager
def mixed(layers: nn.ModuleList, mixtures: nn.ModuleList, task: int) -> Iterator[None]:
    """Have every layer of an encoder add its mixture to its MLP's output while the block runs.

    Args:
        layers: of the encoder.
        mixtures: one per layer.
        task: whose routers.
    """
    with ExitStack() as held:
        for layer, mixture in zip(layers, mixtures, strict=True):
            for hook in _beside(layer, mixture, task):
                held.callback(hook.remove)
        yield


def _beside(layer: nn.Module, mixture: Mixture, task: int) -> tuple:
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        read[:] = args[:1]

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + mixture(read.pop(), task).to(output.dtype)

    return layer.layer_norm2.register_forward_pre_hook(keep), layer.mlp.register_forward_hook(add)
