"""A mixture of adapters in parallel to a layer's MLP: experts that all tasks share, and a router per task.

Legend: b examples, s tokens, d width, E experts, k of them for an example, h bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu, softplus

#: Minimum standard deviation of the noise on a router's scores (Shazeer et al. 2017, equation 4, with the
#: constant of MoE-Adapters).
LEAST_NOISE = 0.01


class Expert(nn.Module):
    """Two linear layers d → h → d, of which the second starts at zero.

    Args:
        width: d.
        bottleneck: h.
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)


class Router(nn.Module):
    """Scores of the experts for an example, and the spread of the training noise on them; both start at zero.

    Args:
        width: d.
        experts: E.
    """

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.score, self.spread = (nn.Parameter(torch.zeros(experts, width)) for _ in range(2))

    def forward(self, first: Tensor, top_k: int) -> Tensor:
        """Return the gates (b, E): softmax over the `top_k` best experts, 0 for the others.

        Args:
            first: (b, d), each example's first token.
            top_k: number of experts per example.
        """
        # In fp32 even under autocast: close scores decide which experts are chosen.
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

    y = s Σ_e g_e (U_e drop(relu(D_e x + b_e)) + c_e), with the same gates g for all tokens of an example.

    For examples of many tokens, only the k chosen experts are computed, by a product with copies of their
    matrices; for examples of few tokens the copies would be larger than the outputs of all experts, so all
    are computed. Either way every expert gets a gradient, one that no example chose a gradient of 0.

    Args:
        width: d.
        experts: E.
        bottleneck: h.
        tasks: number of routers.
        top_k: k, experts per example.
        scale: s.
        dropout: dropout on the bottleneck while training.
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
        #: (E,) number of examples for which each expert was chosen in training; not counted when None.
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Return the mixture's output (b, s, d).

        Args:
            x: (b, s, d), the input of the layer's second norm.
            task: index of the router.
        """
        gates = self.routers[task](x[:, 0], self.top_k)
        if self.training and self.chosen is not None:
            self.chosen += (gates > 0).sum(0)
        x, gates = (value.to(self.experts[0].down.weight.dtype) for value in (x, gates))
        few = x.shape[1] * len(self.experts) <= self.top_k * x.shape[2]
        return self.scale * (self._dense_sum(x, gates) if few else self._sparse_sum(x, gates))

    def _dense_sum(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return Σ_e g_e E_e(x), computing all experts."""
        down, up = [e.down for e in self.experts], [e.up for e in self.experts]
        inner = self._gated(
            linear(x, torch.cat([d.weight for d in down]), torch.cat([d.bias for d in down])), gates
        )
        return (
            linear(inner, torch.cat([u.weight for u in up], dim=1))
            + (gates @ torch.stack([u.bias for u in up]))[:, None]
        )

    def _sparse_sum(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return Σ_e g_e E_e(x), computing the chosen experts of each example alone."""
        gates, chosen = gates.topk(self.top_k, dim=-1)  # (b, k)

        def gather(tensors: list[Tensor]) -> Tensor:
            """Return the chosen experts' tensors (b, k, ...).

            By indexing, whose gradient is summed in one order on a GPU too, unlike that of `index_select`.
            """
            return torch.stack(tensors)[chosen]

        down, up = [e.down for e in self.experts], [e.up for e in self.experts]
        inner = torch.baddbmm(
            gather([d.bias for d in down]).flatten(1)[:, None],
            x,
            gather([d.weight for d in down]).flatten(1, 2).mT,
        )  # (b, s, k h)
        return torch.bmm(self._gated(inner, gates), gather([u.weight.mT for u in up]).flatten(1, 2)) + gates[
            :, None
        ] @ gather([u.bias for u in up])

    def _gated(self, inner: Tensor, gates: Tensor) -> Tensor:
        return (
            dropout(relu(inner), self.dropout, self.training)
            * gates.repeat_interleave(self.bottleneck, dim=1)[:, None]
        )


@contextmanager
def mixed(layers: nn.ModuleList, mixtures: nn.ModuleList, task: int) -> Iterator[None]:
    """Add every layer's mixture to its MLP's output while the block runs.

    Args:
        layers: layers of the encoder.
        mixtures: one per layer.
        task: index of the routers.
    """
    with ExitStack() as hooks:
        for layer, mixture in zip(layers, mixtures, strict=True):
            for hook in _add_to_mlp(layer, mixture, task):
                hooks.callback(hook.remove)
        yield


def _add_to_mlp(layer: nn.Module, mixture: Mixture, task: int) -> tuple:
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple) -> None:
        inputs[:] = args[:1]

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + mixture(inputs.pop(), task).to(output.dtype)

    return layer.layer_norm2.register_forward_pre_hook(keep_input), layer.mlp.register_forward_hook(add)
