"""Every route to the principal subspace against the full float64 SVD."""

import pytest
import torch

METHODS = ["auto", "svd", "gram", "randomized"]
SHAPES = [(96, 96), (160, 64), (64, 160), (1, 40), (40, 1)]
SPECTRA = {
    "steep": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -1.0,
    "flat": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -0.5,
    "geometric": lambda n: 0.8 ** torch.arange(n, dtype=torch.float64),
    "white": lambda n: torch.linspace(1.0, 0.9, n, dtype=torch.float64),
}


def reference(weight, energy):
    """(k, captured share, basis) by the full SVD in float64."""
    _, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    share = singular.square().cumsum(0) / singular.square().sum()
    k = min(int((share < energy - 1e-10).sum()) + 1, len(singular))
    return k, float(share[k - 1]), right[:k].T


def assert_is_reference(sub, weight, energy, result):
    k, share, basis = reference(weight, energy)
    assert result.rank == k == result.basis.shape[1]
    assert result.energy == pytest.approx(share, abs=1e-4)
    assert result.basis.dtype == torch.float32 and result.basis.is_contiguous()
    assert sub.orthonormality_error(result.basis) < 2e-6
    captured = (weight.double() @ result.basis.double()).square().sum() / weight.double().square().sum()
    assert float(captured) == pytest.approx(share, abs=1e-4), "the span itself holds the energy"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rank_and_energy_equal_the_full_svd(sub, with_spectrum, method, shape, spectrum):
    weight = with_spectrum(*shape, SPECTRA[spectrum](min(shape))).float()
    for energy in (0.2, 0.6, 0.85, 0.99):
        assert_is_reference(sub, weight, energy, sub.principal_basis(weight, energy, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(400, 400), (500, 300), (300, 500)], ids=str)
def test_the_subspace_equals_the_full_svd_where_a_gap_defines_it(sub, with_spectrum, method, shape):
    singular = torch.cat([torch.linspace(3.0, 2.0, 20), torch.linspace(0.3, 0.1, 280)])
    weight = with_spectrum(*shape, singular).float()
    energy = float(singular[:20].square().sum() / singular.square().sum()) - 1e-3
    result = sub.principal_basis(weight, energy, method=method)
    _, _, basis = reference(weight, energy)
    assert result.rank == 20
    difference = result.basis.double() @ result.basis.double().T - basis @ basis.T
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("energy", [0.6, 0.85])
def test_rank_holds_at_a_size_where_truncation_pays(sub, with_spectrum, method, exponent, energy):
    weight = with_spectrum(600, 600, torch.arange(1, 601, dtype=torch.float64) ** -exponent).float()
    assert_is_reference(sub, weight, energy, sub.principal_basis(weight, energy, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_clusters_and_repeats_get_the_same_rank(sub, with_spectrum, method):
    singular = torch.cat([torch.full((30,), 2.0), torch.full((60,), 1.0), torch.full((110,), 0.2)]).double()
    weight = with_spectrum(300, 200, singular).float()
    for energy in (0.3, 0.65, 0.9, 0.99):
        assert_is_reference(sub, weight, energy, sub.principal_basis(weight, energy, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_needs_no_more_than_its_rank(sub, with_spectrum, method):
    weight = with_spectrum(120, 80, torch.tensor([5.0, 4.0, 3.0])).float()
    result = sub.principal_basis(weight, 1.0, method=method)
    assert result.rank == 3 and result.energy == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_full_energy_of_a_full_rank_weight_is_the_whole_space(sub, with_spectrum, method):
    weight = with_spectrum(50, 30, torch.linspace(2.0, 1.0, 30)).float()
    result = sub.principal_basis(weight, 1.0, method=method)
    assert result.rank == 30 and sub.orthonormality_error(result.basis) < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_strict_keeps_one_vector_fewer(sub, with_spectrum, method):
    weight = with_spectrum(70, 60, torch.arange(1, 61, dtype=torch.float64) ** -0.5).float()
    default = sub.principal_basis(weight, 0.85, method=method)
    strict = sub.principal_basis(weight, 0.85, method=method, strict=True)
    assert strict.rank == default.rank - 1 and strict.energy < 0.85 <= default.energy
    assert sub.overlap(strict.basis, default.basis) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_weight_protects_nothing(sub, method):
    result = sub.principal_basis(torch.zeros(12, 8), 0.9, method=method)
    assert result.basis.shape == (8, 0) and result.rank == 0 and result.energy == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_weight_does_not_matter(sub, with_spectrum, method, scale):
    weight = with_spectrum(90, 70, torch.arange(1, 71, dtype=torch.float64) ** -1.0).float()
    expected = sub.principal_basis(weight, 0.85, method="svd").rank
    result = sub.principal_basis(weight * scale, 0.85, method=method)
    assert result.rank == expected and sub.orthonormality_error(result.basis) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_taken_at_their_own_values(sub, with_spectrum, dtype):
    weight = with_spectrum(80, 64, torch.arange(1, 65, dtype=torch.float64) ** -1.0).to(dtype)
    assert_is_reference(sub, weight, 0.85, sub.principal_basis(weight, 0.85))


def test_the_same_seed_gives_the_same_basis(sub, with_spectrum):
    weight = with_spectrum(600, 600, torch.arange(1, 601, dtype=torch.float64) ** -1.0).float()
    before = torch.random.get_rng_state()
    first, second = (sub.principal_basis(weight, 0.6, method="randomized", seed=3) for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state is left alone"


def test_mistakes_are_named(sub):
    with pytest.raises(sub.EnergyError, match="it is 1.2"):
        sub.principal_basis(torch.ones(2, 2), 1.2)
    with pytest.raises(sub.NonFiniteError, match="the weight holds NaN or infinity"):
        sub.principal_basis(torch.tensor([[float("nan"), 1.0]]), 0.9)
