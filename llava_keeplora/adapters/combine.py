"""Many deltas of one layer as a single one: exactly, by stacking, or of a smaller rank, by the truncated SVD.

Legend: in / out features of a layer, r_i rank of one task's delta, R their sum, k a smaller rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_keeplora.adapters.deltas import Delta, Deltas


def concatenate(tasks: Sequence[Deltas]) -> dict[str, Delta]:
    """One delta per layer, the sum of its tasks': Σ s_i B_i A_i = [s_1 B_1, ...] [A_1.

    ...], of scale 1 and rank R.

    Args:
        tasks: their low-rank deltas.
    """
    found = {}
    for name in dict.fromkeys(name for task in tasks for name in task):
        changes = [task[name] for task in tasks if name in task]
        A = torch.cat([change.A.float() for change in changes])
        found[name] = Delta(A, torch.cat([change.scale * change.B.float() for change in changes], dim=1), 1.0)
    return found


def compress(delta: Delta, rank: int) -> tuple[Delta, Tensor]:
    """Return the nearest delta of a smaller rank in the Frobenius norm, without the dense product.

    Source: Eckart and Young, 1936.

    Args:
        delta: of rank R.
        rank: k; more than the delta has changes nothing.

    Returns:
        the delta, its singular values shared evenly by A and B; and all singular values of the given one,
        falling.
    """
    # B A = Q_b (R_b R_aᵀ) Q_aᵀ, and the middle is R × R at most.
    Q_b, R_b = torch.linalg.qr(delta.scale * delta.B.double())
    Q_a, R_a = torch.linalg.qr(delta.A.double().T)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T)
    root = S[:rank].sqrt()
    A = root[:, None] * (Vh[:rank][: len(root)] @ Q_a.T)
    return Delta(A.float(), (Q_b @ U[:, : len(root)] * root).float(), 1.0), S


def pad(delta: Delta, rank: int) -> Delta:
    """The same delta with zeros up to a rank."""
    missing = rank - delta.A.shape[0]
    A = torch.cat([delta.A, delta.A.new_zeros(missing, delta.A.shape[1])])
    return Delta(A, torch.cat([delta.B, delta.B.new_zeros(delta.B.shape[0], missing)], dim=1), delta.scale)
