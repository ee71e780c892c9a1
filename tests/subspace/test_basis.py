"""Projections, appending and overlap as identities in float64."""

import pytest
import torch


def test_project_and_residual_split_a_vector(sub, random_basis):
    basis = random_basis(40, 7)
    v = torch.randn(3, 5, 40)
    inside, outside = sub.project(v, basis), sub.residual(v, basis)
    assert torch.allclose(inside + outside, v, atol=1e-6)
    assert torch.allclose(sub.project(inside, basis), inside, atol=1e-5)
    assert (outside @ basis).abs().max() < 1e-5
    dense = basis.double() @ basis.double().T
    assert torch.allclose(inside.double(), v.double() @ dense, atol=1e-5)


def test_an_empty_basis_protects_nothing(sub):
    v, none = torch.randn(2, 8), sub.empty_basis(8)
    assert torch.equal(sub.residual(v, none), v)
    assert sub.project(v, none).abs().max() == 0
    assert sub.orthonormality_error(none) == 0.0


def test_a_basis_of_another_layer_is_refused(plain, random_basis):
    with pytest.raises(plain.ShapeError, match=r"input width 9 must have shape \(9, k\)"):
        plain.project(torch.randn(2, 9), random_basis(8, 2))


def test_orthonormality_error_is_the_largest_deviation(sub, random_basis):
    basis = random_basis(30, 6)
    assert sub.orthonormality_error(basis) < 2e-7
    basis[:, 0] *= 1.1
    assert sub.orthonormality_error(basis) == pytest.approx(0.21, abs=1e-5)


def test_append_keeps_the_old_columns_bitwise(sub, random_basis):
    basis, new = random_basis(50, 12), torch.randn(50, 5)
    grown = sub.append_directions(basis, new)
    assert grown.shape == (50, 17) and grown.dtype == torch.float32
    assert torch.equal(grown[:, :12], basis)
    assert sub.orthonormality_error(grown) < 5e-7
    assert sub.residual(new.T, grown).abs().max() < 1e-5, "the new directions are inside the grown span"


def test_append_repairs_directions_that_almost_lie_in_the_basis(sub, random_basis):
    basis = random_basis(50, 12)
    nearly = basis[:, :3] + 1e-3 * torch.randn(50, 3)
    assert sub.orthonormality_error(sub.append_directions(basis, nearly)) < 1e-6


def test_a_basis_does_not_drift_while_it_grows(sub):
    basis = sub.empty_basis(120)
    for step in range(50):
        nearly_known = 0.9 * sub.project(torch.randn(2, 120), basis).T + torch.randn(120, 2)
        grown = sub.append_directions(basis, nearly_known)
        assert torch.equal(grown[:, : basis.shape[1]], basis)
        basis = grown
    assert basis.shape == (120, 100) and sub.orthonormality_error(basis) < 5e-7


def test_a_drifted_basis_is_made_orthonormal_again_when_it_grows(sub, random_basis):
    exact = random_basis(60, 20)
    drifted = exact.half().float()
    assert sub.orthonormality_error(drifted) > 1e-5
    grown = sub.append_directions(drifted, torch.randn(60, 4))
    assert sub.orthonormality_error(grown) < 5e-7
    assert sub.residual(drifted.T, grown[:, :20]).abs().max() < 1e-6, "the span stays"
    values, vectors = torch.linalg.eigh(drifted.double().T @ drifted.double())
    nearest = drifted.double() @ (vectors * values.rsqrt()) @ vectors.T
    assert torch.allclose(sub.orthonormalized(drifted).double(), nearest, atol=1e-7)


def test_columns_that_are_no_basis_are_refused(sub, random_basis):
    scaled = 1.1 * random_basis(60, 20)
    with pytest.raises(
        sub.ShapeError, match=r"shape \(60, 20\) isn't orthonormal: \|U\^T U - I\| reaches 2.1e-01"
    ):
        sub.append_directions(scaled, torch.randn(60, 1))
    with pytest.raises(sub.ShapeError, match="isn't orthonormal"):
        sub.orthonormalized(torch.full((4, 2), float("nan")))


def test_append_of_orthonormal_directions_keeps_their_sense(sub, random_basis):
    whole = random_basis(20, 6)
    assert torch.allclose(sub.append_directions(whole[:, :4], whole[:, 4:]), whole, atol=1e-6)


def test_append_of_nothing_changes_nothing(sub, random_basis):
    basis = random_basis(10, 3)
    assert torch.equal(sub.append_directions(basis, torch.zeros(10, 0)), basis)


def test_append_can_fill_the_space_and_not_more(sub, random_basis):
    full = sub.append_directions(random_basis(10, 6), torch.randn(10, 4))
    assert full.shape == (10, 10) and sub.orthonormality_error(full) < 1e-6
    with pytest.raises(
        sub.RankError, match="1 new directions don't fit into a space of dimension 10 next to 10"
    ) as info:
        sub.append_directions(full, torch.randn(10, 1))
    assert (info.value.requested, info.value.available) == (1, 0)


def test_append_drops_nothing_silently(sub, random_basis):
    basis = random_basis(20, 4)
    dependent = torch.cat([torch.randn(20, 1), basis[:, :1] * 2.0], dim=1)
    with pytest.raises(sub.RankError, match="only 1 of 2 new directions are independent"):
        sub.append_directions(basis, dependent)
    with pytest.raises(sub.RankError, match="only 0 of 1"):
        sub.append_directions(basis, torch.zeros(20, 1))
    with pytest.raises(sub.NonFiniteError):
        sub.append_directions(basis, torch.full((20, 1), float("nan")))


def test_overlap_runs_from_orthogonal_to_contained(sub, random_basis):
    whole = random_basis(30, 10)
    assert sub.overlap(whole[:, :4], whole[:, 4:]) < 1e-12
    assert sub.overlap(whole[:, :4], whole) == pytest.approx(1.0, abs=1e-6)
    assert sub.overlap(whole[:, :4], whole[:, 2:6]) == pytest.approx(0.5, abs=1e-6)
    assert sub.overlap(whole, sub.empty_basis(30)) == 0.0
    other = random_basis(30, 6, seed=9)
    cosines = torch.linalg.svdvals(whole.double().T @ other.double())
    assert sub.overlap(whole, other) == pytest.approx(float(cosines.square().mean()), rel=1e-6)
