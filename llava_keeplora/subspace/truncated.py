"""Leading eigenvectors of a Gram matrix up to an energy, without the full decomposition.

Block Rayleigh-Ritz with a Chebyshev filter. The total energy is known exactly (the trace), so a prefix of the
spectrum is enough to apply the energy rule. A result is returned only if the error bound leaves no doubt
about the rank; otherwise the caller computes the full decomposition.

Shapes: G (n, n) symmetric positive semi-definite, n = its size, p = block width, k = number of leading pairs.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), the randomised
start; Zhou and Saad, "A Chebyshev-Davidson algorithm" (SIAM J. Matrix Anal. 2007), the filter; Parlett, "The
Symmetric Eigenvalue Problem" (1998), chapter 11, the residual bound.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.energy import energy_rank

# Largest energy for a float32 Gram matrix, which resolves eigenvalues down to 1e-7 of the largest; an energy
# nearer to 1 depends on smaller ones.
GRAM_ENERGY = 0.999
# Widest block, as a fraction of n; wider ones cost more than the full decomposition. Small matrices have the
# smaller limit.
WIDEST = 0.33
WIDEST_SMALL = 0.2
SMALL = 1536
# Below this size the full decomposition takes milliseconds.
SMALLEST = 256
# Width of the block relative to the wanted prefix: the filter needs a gap between what it keeps and what it
# damps.
MARGIN = 1.5
# Degree of the filter: each degree is one product with G; beyond 4, the small wanted components are lost in
# float32.
DEGREE = 4
# Rounding of a float32 Gram matrix, as a fraction of its largest eigenvalue.
CUT_FLOOR = 1e-6
# The residual bound is first order in each vector; doubling it covers the coupling between them.
SAFETY = 2.0
# Energy that the returned prefix may miss compared with the exact leading eigenvectors, as a fraction of the
# total.
MISSED = 5e-5
# Truncation is not tried if the width estimated without a sketch exceeds the widest block by this factor.
HOPELESS = 1.25
# Number of column blocks of a Gram matrix, of which only those on and below the diagonal are multiplied: 5/8
# of the work for four.
BLOCKS = 4


class Ritz(NamedTuple):
    """Ritz pairs of a block: values (p,) float64 descending, and the factors of their vectors.

    The vectors are block @ rotation, (n, p), and G @ vectors is image @ rotation; both are formed only when
    needed.
    """

    values: Tensor
    rotation: Tensor
    block: Tensor
    image: Tensor

    def vectors(self, count: int) -> Tensor:
        """Return the first `count` Ritz vectors, (n, count)."""
        return self.block @ self.rotation[:, :count]

    def residuals(self, vectors: Tensor) -> Tensor:
        """Return the squared residual norms |G v - theta v|^2 of the first vectors, (count,) float64."""
        count = vectors.shape[1]
        images = self.image @ self.rotation[:, :count]
        return (
            torch.addcmul(images, vectors, self.values[:count].to(vectors), value=-1.0)
            .square()
            .sum(0)
            .double()
        )


def gram_matrix(tall: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Return X^T X, exactly symmetric, multiplying only the blocks that do not follow from symmetry.

    Args:
        tall: X, (m, n).
    """
    n = tall.shape[1]
    if n < SMALLEST:
        return tall.T @ tall
    gram = tall.new_empty(n, n)
    bounds = [n * block // BLOCKS for block in range(BLOCKS + 1)]
    for start, end in zip(bounds, bounds[1:]):
        gram[start:end, :end] = tall[:, start:end].T @ tall[:, :end]
        gram[:start, start:end] = gram[start:end, :start].T
    return gram


def leading_eigenpairs(
    gram: Float[Tensor, "n n"], energy: float, total: float, seed: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]] | None:
    """Return the fewest leading eigenpairs that hold `energy * total`; None if a full solver is better.

    Args:
        gram: G, (n, n), float32.
        energy: fraction to reach, in (0, 1].
        total: trace of G.
        seed: seed of the random start.

    Returns:
        eigenvalues (k,), float64, descending, and orthonormal eigenvectors (n, k); None if the prefix is too
        long for truncation to save time, or its length remains in doubt.
    """
    n = gram.shape[0]
    if n < SMALLEST:
        return None
    widest = int(n * (WIDEST if n > SMALL else WIDEST_SMALL))
    if MARGIN * energy_rank(_power_law(gram, total), energy) > HOPELESS * widest:
        return None
    generator = torch.Generator(device=gram.device).manual_seed(seed)
    block = _orthonormal(_sketch(gram, max(32, n // 20), generator))
    ritz = _rayleigh_ritz(gram, _orthonormal(gram @ block))
    for _ in range(4):
        vectors = _certain_vectors(ritz, energy, total)
        if vectors is not None:
            return ritz.values[: vectors.shape[1]], vectors
        spectrum = _extrapolate(ritz.values, total, n)
        width = max(len(ritz.values), int(MARGIN * energy_rank(spectrum, energy, total=total)) + 16)
        if width > widest:
            return None
        ritz = _rayleigh_ritz(gram, _filtered(gram, ritz, width, float(spectrum[width]), generator))
    return None


def _power_law(gram: Tensor, total: float) -> Tensor:
    """Guess the whole spectrum without a sketch, as a power law.

    It is the power law that has G's ratio of the sum of squared eigenvalues to their squared sum.
    """
    ratio = (float(gram.norm()) / total) ** 2
    index = torch.arange(1, gram.shape[0] + 1, dtype=torch.float64)
    spectra = index.unsqueeze(0) ** -torch.linspace(0.0, 4.0, 41, dtype=torch.float64).unsqueeze(1)
    spectra = spectra / spectra.sum(1, keepdim=True)
    return spectra[(spectra.square().sum(1) - ratio).abs().argmin()]


def _sketch(gram: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return G times a random sign matrix with one entry per row, at the cost of reading G once."""
    n = gram.shape[0]
    bucket = torch.randint(width, (n,), generator=generator, device=gram.device)
    bucket[torch.randperm(n, generator=generator, device=gram.device)[:width]] = torch.arange(
        width, device=gram.device
    )
    sign = torch.randint(2, (n, 1), generator=generator, device=gram.device).to(gram) * 2 - 1
    return gram.new_zeros(width, n).index_add_(0, bucket, gram * sign).T


def _orthonormal(block: Tensor) -> Tensor:
    return torch.linalg.qr(block).Q


def _rayleigh_ritz(gram: Tensor, block: Tensor) -> Ritz:
    """Return the best approximate eigenpairs inside the span of an orthonormal block."""
    image = gram @ block
    small = block.T @ image
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return Ritz(values.flip(0).double().clamp_min(0.0), rotation.flip(1), block, image)


def _certain_vectors(ritz: Ritz, energy: float, total: float) -> Tensor | None:
    """Return as many Ritz vectors as the energy rule needs; None if the bounds leave their number in doubt.

    Ritz values bound the eigenvalues from below, and lambda_i <= theta_i + |r_i|^2 / (theta_i - mu), where mu
    bounds the spectrum outside the block; the Ritz value at nine tenths of the block is used for mu.
    """
    inside = int(0.9 * len(ritz.values))
    lower = torch.cumsum(ritz.values, 0)
    if float(lower[inside - 1]) < energy * total:
        return None
    rank = energy_rank(ritz.values, energy, total=total)
    gaps = ritz.values[:rank] - ritz.values[inside]
    if bool((gaps <= 0.0).any()):
        return None
    vectors = ritz.vectors(rank)
    missing = SAFETY * float((ritz.residuals(vectors) / gaps).sum())
    beyond_doubt = rank == 1 or float(lower[rank - 2]) + missing < energy * total
    return vectors if beyond_doubt and missing <= MISSED * total else None


def _extrapolate(values: Tensor, total: float, n: int) -> Tensor:
    """Guess the whole spectrum: the upper third of the Ritz values, then a power law with the right trace."""
    known = max(1, len(values) // 3)
    left = total - float(values[:known].sum())
    index = torch.arange(known + 1, n + 1, dtype=torch.float64, device=values.device) / known
    slopes = torch.linspace(0.0, 4.0, 81, dtype=torch.float64, device=values.device)
    sums = float(values[known - 1]) * (index.unsqueeze(0) ** -slopes.unsqueeze(1)).sum(1)
    slope = slopes[(sums - left).abs().argmin()]
    tail = index**-slope
    return torch.cat([values[:known], tail * (max(left, 0.0) / float(tail.sum()))])


def _filtered(gram: Tensor, ritz: Ritz, width: int, cut: float, generator: torch.Generator) -> Tensor:
    """Return a better orthonormal block, (n, width), by a Chebyshev polynomial of G.

    The polynomial is small on [0, cut] and steep above. The strongest directions are left out of the filter
    and added back, because it would magnify them so much that the weak wanted ones are lost in float32.
    """
    vectors = ritz.vectors(len(ritz.values))
    count = int((ritz.values[: len(ritz.values) // 2] > 8.0 * cut).sum())
    strong, rest = vectors[:, :count], vectors[:, count:]
    image = ritz.image @ ritz.rotation[:, :count]
    # (I - H H^T) G (I - H H^T), symmetric by construction.
    half_update = image - strong @ (strong.T @ image / 2)
    deflated = torch.addmm(
        torch.addmm(gram, strong, half_update.T, alpha=-1.0), half_update, strong.T, alpha=-1.0
    )
    fresh = width - vectors.shape[1]
    start = rest if fresh == 0 else torch.cat([rest, _sketch(deflated, fresh, generator)], dim=1)
    # A low-rank G has no spectrum to damp; the floor keeps the polynomial finite.
    half = max(cut, CUT_FLOOR * float(ritz.values[0])) / 2
    start = start / start.norm(dim=0).clamp_min(torch.finfo(start.dtype).tiny)
    before, now = start, torch.addmm(start, deflated, start, beta=-1.0, alpha=1.0 / half)
    for _ in range(DEGREE - 1):
        before, now = now, torch.addmm(now, deflated, now, beta=-2.0, alpha=2.0 / half).sub_(before)
    now = now / now.norm(dim=0).clamp_min(torch.finfo(now.dtype).tiny)
    # The image instead of the strong vectors themselves: a step of power iteration at no further cost.
    return _orthonormal(torch.cat([image, now], dim=1))
