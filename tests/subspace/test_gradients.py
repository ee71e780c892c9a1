"""Residual gradient directions against the full float64 SVD of G (I - U U^T)."""

import pytest
import torch

SHAPES = [(48, 48), (80, 32), (32, 80), (300, 200)]


def naive(gradient, basis, rank):
    u = basis.double()
    outside = gradient.double() - gradient.double() @ u @ u.T
    left, singular, right = torch.linalg.svd(outside.T, full_matrices=False)
    return left[:, :rank], singular, right[:rank].T, outside


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("protected", [0, 6, 20])
def test_equals_the_full_svd(sub, with_spectrum, random_basis, shape, protected):
    gradient = with_spectrum(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -1.0).float()
    basis, rank = random_basis(shape[1], protected, seed=7), 8
    found = sub.residual_gradient_directions(gradient, basis, rank)
    left, singular, right, outside = naive(gradient, basis, rank)
    assert torch.allclose(found.singular_values.double(), singular[:rank], rtol=1e-5)
    assert (found.A.double() @ found.A.double().T - left @ left.T).abs().max() < 1e-4
    assert (found.right.double() @ found.right.double().T - right @ right.T).abs().max() < 1e-4
    energy = singular.square().sum()
    assert found.captured == pytest.approx(float(singular[:rank].square().sum() / energy), abs=1e-6)
    assert found.residual_energy == pytest.approx(float(energy / gradient.double().square().sum()), abs=1e-6)
    rebuilt = (found.A * found.singular_values) @ found.right.T
    assert torch.allclose(rebuilt.double(), left @ left.T @ outside.T, atol=1e-5), (
        "A S V^T is the truncated G_hat^T"
    )


@pytest.mark.parametrize("exponent", [0.0, 0.7, 2.0])
def test_large_layers_agree_whether_or_not_truncation_converges(sub, with_spectrum, random_basis, exponent):
    singular = torch.linspace(1.0, 0.9, 300, dtype=torch.float64) * torch.arange(1, 301).double() ** -exponent
    gradient, basis = with_spectrum(300, 320, singular).float(), random_basis(320, 30, seed=7)
    found = sub.residual_gradient_directions(gradient, basis, 6)
    left, exact, _, _ = naive(gradient, basis, 6)
    assert torch.allclose(found.singular_values.double(), exact[:6], rtol=1e-5)
    assert (found.A.double() @ found.A.double().T - left @ left.T).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_A_is_orthonormal_and_orthogonal_to_the_basis(sub, random_basis, scale):
    basis = random_basis(64, 40)
    found = sub.residual_gradient_directions(torch.randn(50, 64) * scale, basis, 16)
    assert sub.orthonormality_error(found.A) < 1e-6
    assert (basis.double().T @ found.A.double()).abs().max() < 1e-6
    assert sub.orthonormality_error(found.right) < 1e-5
    assert (found.singular_values.diff() <= 0).all()


def test_a_gradient_mostly_inside_the_basis_still_gives_clean_directions(sub, random_basis):
    basis = random_basis(64, 20)
    inside = torch.randn(50, 20) @ basis.T
    found = sub.residual_gradient_directions(inside + 1e-3 * torch.randn(50, 64), basis, 8)
    assert sub.orthonormality_error(found.A) < 1e-6
    assert (basis.double().T @ found.A.double()).abs().max() < 1e-6


def test_the_last_direction_of_the_space_can_be_used(sub, random_basis):
    found = sub.residual_gradient_directions(torch.randn(50, 16), random_basis(16, 12), 4)
    assert found.A.shape == (16, 4) and found.captured == pytest.approx(1.0)


def test_a_rank_beyond_the_residual_space_is_refused(sub, random_basis):
    with pytest.raises(sub.RankError, match="rank 5 .* 12 directions are protected, 4 are left") as info:
        sub.residual_gradient_directions(torch.randn(50, 16), random_basis(16, 12), 5)
    assert (info.value.requested, info.value.available) == (5, 4)
    with pytest.raises(sub.RankError, match="rank 0"):
        sub.residual_gradient_directions(torch.randn(5, 6), sub.empty_basis(6), 0)


def test_directions_are_never_made_up(sub, random_basis):
    with pytest.raises(sub.RankError, match="only 0 direction"):
        sub.residual_gradient_directions(torch.zeros(8, 8), sub.empty_basis(8), 2)
    thin = torch.randn(20, 3) @ torch.randn(3, 30)
    with pytest.raises(sub.RankError, match="only 3 direction.*fewer than the rank 4") as info:
        sub.residual_gradient_directions(thin, sub.empty_basis(30), 4)
    assert info.value.available == 3
    basis = random_basis(30, 10)
    protected = torch.randn(20, 10) @ basis.T
    with pytest.raises(sub.RankError, match="only 0 direction"):
        sub.residual_gradient_directions(protected, basis, 2)


def test_fewer_directions_on_request(sub):
    thin = torch.randn(20, 3) @ torch.randn(3, 30)
    found = sub.residual_gradient_directions(thin, sub.empty_basis(30), 8, allow_fewer=True)
    assert found.A.shape == (30, 3) and found.right.shape == (20, 3) and found.captured == pytest.approx(1.0)
    with pytest.raises(sub.RankError):
        sub.residual_gradient_directions(torch.zeros(8, 8), sub.empty_basis(8), 2, allow_fewer=True)


def test_a_non_finite_gradient_is_named(sub):
    with pytest.raises(sub.NonFiniteError, match="the gradient holds NaN or infinity"):
        sub.residual_gradient_directions(torch.full((4, 4), float("nan")), sub.empty_basis(4), 1)
