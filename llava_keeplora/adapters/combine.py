"""Combination of a layer's deltas into one: exactly, by stacking, or to a lower rank, by a truncated SVD.

Legend: in / out features of a layer, r_i rank of one task's delta, R their sum, k a lower rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_keeplora.adapters.deltas import Delta, Deltas


def concatenate(tasks: Sequence[Deltas]) -> dict[str, Delta]:
    """Return one delta per layer, the exact sum of the tasks' deltas, of scale 1 and rank R.

    Σ s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].

    Args:
        tasks: the low-rank deltas of each task.
    """
    combined = {}
    for name in dict.fromkeys(name for task in tasks for name in task):
        changes = [task[name] for task in tasks if name in task]
        A = torch.cat([change.A.float() for change in changes])
        B = torch.cat([change.scale * change.B.float() for change in changes], dim=1)
        combined[name] = Delta(A, B, 1.0)
    return combined


def singular_values(delta: Delta) -> Tensor:
    """Return a delta's singular values in fp64, descending, without the dense product.

    Args:
        delta: a delta of rank R.
    """
    # B A = Q_b (R_b R_aᵀ) Q_aᵀ with orthonormal Q_b and Q_a.
    R_b = torch.linalg.qr(delta.scale * delta.B.double(), mode="r").R
    R_a = torch.linalg.qr(delta.A.double().T, mode="r").R
    return torch.linalg.svdvals(R_b @ R_a.T)


def relative_error(S: Tensor, rank: int) -> float:
    """Return ‖ΔW − ΔW_k‖ / ‖ΔW‖, the relative Frobenius error of the nearest delta of a lower rank.

    Source: Eckart and Young, 1936.

    Args:
        S: all singular values of ΔW, descending.
        rank: k.
    """
    whole = S.square().sum()
    return float((S[rank:].square().sum() / whole.clamp(min=torch.finfo(S.dtype).tiny)).sqrt())


def compress(delta: Delta, rank: int) -> tuple[Delta, Tensor]:
    """Return the nearest delta of a lower rank in the Frobenius norm, without the dense product.

    Source: Eckart and Young, 1936.

    Args:
        delta: a delta of rank R.
        rank: k; a rank of R or more changes nothing.

    Returns:
        (the compressed delta, the square roots of its singular values in A and in B; all singular values of
        the given delta, descending).
    """
    # B A = Q_b (R_b R_aᵀ) Q_aᵀ, whose middle factor is at most R × R.
    Q_b, R_b = torch.linalg.qr(delta.scale * delta.B.double())
    Q_a, R_a = torch.linalg.qr(delta.A.double().T)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T)
    root = S[:rank].sqrt()
    A = root[:, None] * (Vh[:rank][: len(root)] @ Q_a.T)
    return Delta(A.float(), (Q_b @ U[:, : len(root)] * root).float(), 1.0), S


def pad(delta: Delta, rank: int) -> Delta:
    """Return the same delta with zeros appended to A and B up to a rank."""
    missing = rank - delta.A.shape[0]
    A = torch.cat([delta.A, delta.A.new_zeros(missing, delta.A.shape[1])])
    return Delta(A, torch.cat([delta.B, delta.B.new_zeros(delta.B.shape[0], missing)], dim=1), delta.scale)
