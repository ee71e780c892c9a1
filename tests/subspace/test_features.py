"""Feature directions against the definition: the SVD of the residual features in float64."""

import pytest
import torch


def features(rows, dim, decay, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return (x * torch.arange(1, dim + 1, dtype=torch.float64) ** -decay) @ mix


def naive(x, basis, energy):
    """(new directions, energy before, energy after) from X itself."""
    u = basis.double()
    outside = x - x @ u @ u.T
    _, singular, right = torch.linalg.svd(outside, full_matrices=False)
    total, reached, m = float(x.square().sum()), float((x @ u).square().sum()), 0
    before = reached / total
    while reached < energy * total and m < x.shape[1] - u.shape[1]:
        reached += float(singular[m] ** 2)
        m += 1
    return right[:m].T, before, reached / total


@pytest.mark.parametrize("protected", [0, 5, 40, 63])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("decay", [0.3, 1.5])
def test_equals_the_svd_of_residual_features(sub, random_basis, protected, energy, decay):
    x, basis = features(300, 64, decay), random_basis(64, protected, seed=5)
    found = sub.feature_directions(x.T @ x, basis, energy)
    new, before, after = naive(x, basis, energy)
    assert found.rank == found.new.shape[1] == new.shape[1]
    assert found.energy_before == pytest.approx(before, abs=1e-6)
    assert found.energy_after == pytest.approx(after, abs=1e-6)
    assert (found.new.double() @ found.new.double().T - new @ new.T).abs().max() < 1e-4
    grown = torch.cat([basis, found.new], dim=1)
    assert sub.orthonormality_error(grown) < 1e-6


@pytest.mark.parametrize("decay", [0.5, 0.8, 1.5])
def test_larger_layers_agree_too(sub, random_basis, decay):
    x, basis = features(1500, 500, decay), random_basis(500, 60, seed=5)
    found = sub.feature_directions(x.T @ x, basis, 0.95)
    new, before, after = naive(x, basis, 0.95)
    assert found.rank == new.shape[1] and found.energy_after == pytest.approx(after, abs=1e-4)
    assert sub.orthonormality_error(torch.cat([basis, found.new], dim=1)) < 1e-6
    held = (x @ found.new.double()).square().sum() / x.square().sum()
    assert float(held) + before == pytest.approx(after, abs=1e-4)


def test_features_inside_the_basis_add_nothing(sub, random_basis):
    basis = random_basis(32, 8)
    x = torch.randn(100, 8, dtype=torch.float64) @ basis.double().T
    found = sub.feature_directions(x.T @ x, basis, 0.99)
    assert found.rank == 0 and found.new.shape == (32, 0)
    assert found.energy_before == found.energy_after == pytest.approx(1.0, abs=1e-6)


def test_features_orthogonal_to_the_basis_are_taken_though_rounding_gives_them_an_energy_of_either_sign(sub):
    """U^T C U of float32 sums is a rounding error there, in about half of the draws below zero."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
        rows = torch.randn(40, 3, generator=generator) @ q[:, 5:8].T
        got = sub.feature_directions((rows.T @ rows).double(), q[:, :5], 0.99)
        assert got.energy_before == pytest.approx(0.0, abs=1e-6) and 1 <= got.rank <= 3


def test_full_energy_never_exceeds_the_space(sub, random_basis):
    x, basis = features(200, 32, 0.2), random_basis(32, 10)
    found = sub.feature_directions(x.T @ x, basis, 1.0)
    assert found.rank <= 22 and found.energy_after == pytest.approx(1.0, abs=1e-6)
    whole = sub.append_directions(basis, found.new)
    again = sub.feature_directions(x.T @ x, whole, 1.0)
    assert again.rank <= 32 - whole.shape[1], "a full basis has no room left"


@pytest.mark.parametrize("width", [48, 600])
def test_a_limit_keeps_the_strongest_directions_and_the_energy_is_what_they_hold(sub, random_basis, width):
    """The wider layer's directions come from a leading block instead of the full decomposition."""
    x, basis = features(700, width, 1.0), random_basis(width, 6)
    moment = x.T @ x
    free, cut = (sub.feature_directions(moment, basis, 0.99, limit) for limit in (None, 3))
    assert free.rank > 3 == cut.rank == cut.new.shape[1]
    strongest, _, _ = naive(x, basis, 0.99)
    assert float((cut.new.double().T @ strongest[:, :3]).square().sum()) == pytest.approx(3, abs=1e-4)
    together = torch.cat([basis.double(), cut.new.double()], dim=1)
    assert cut.energy_after == pytest.approx(
        float((x @ together).square().sum() / x.square().sum()), abs=1e-5
    )
    assert sub.feature_directions(moment, basis, 0.99, 10**6).rank == free.rank
    assert sub.feature_directions(moment, basis, 0.99, 0).rank == 0


def test_few_rows_give_few_directions(sub):
    x = features(3, 32, 0.2)
    found = sub.feature_directions(x.T @ x, sub.empty_basis(32), 1.0)
    assert found.rank == 3


def test_no_energy_adds_nothing(sub, random_basis):
    found = sub.feature_directions(torch.zeros(16, 16), random_basis(16, 4), 0.99)
    assert found.rank == 0 and found.energy_before == 1.0


def test_streamed_moments_give_the_directions_of_the_features(sub, random_basis):
    x, basis = features(400, 48, 1.0).float(), random_basis(48, 6)
    moment = sub.SecondMoment(48)
    for batch in x.split(64):
        moment.add(batch)
    new, _, _ = naive(x.double(), basis, 0.95)
    found = sub.feature_directions(moment.matrix, basis, 0.95)
    assert (found.new.double() @ found.new.double().T - new @ new.T).abs().max() < 1e-3


def test_misfits_are_named(plain, random_basis):
    with pytest.raises(plain.ShapeError, match="a basis for features of input width 8"):
        plain.feature_directions(torch.eye(8), random_basis(9, 2), 0.9)
    with pytest.raises(plain.NonFiniteError, match="second moment of the features"):
        plain.feature_directions(torch.full((4, 4), float("inf")), plain.empty_basis(4), 0.9)
    with pytest.raises(plain.EnergyError):
        plain.feature_directions(torch.eye(4), plain.empty_basis(4), 0.0)


@pytest.mark.parametrize("protected", [0, 5, 40])
def test_leading_directions_are_the_first_left_singular_vectors_of_the_residual_in_both_forms(
    sub, random_basis, protected
):
    x, basis = features(300, 64, 1.0), random_basis(64, protected, seed=5)
    for columns in (x.T, x.T @ x):
        found = sub.leading_directions(columns, basis, 6)
        left = torch.linalg.svd(columns - basis.double() @ basis.double().T @ columns, full_matrices=False).U[
            :, :6
        ]
        assert (found.double().T @ left).abs().sub(torch.eye(6)).abs().max() < 1e-4, (
            "in order of falling energy"
        )
        assert sub.orthonormality_error(torch.cat([basis, found], dim=1)) < 1e-6


def test_there_are_no_leading_directions_beyond_those_that_the_features_have(sub, random_basis):
    basis = random_basis(32, 8)
    x = (
        torch.randn(100, 3, dtype=torch.float64)
        @ torch.linalg.qr(torch.randn(32, 3, dtype=torch.float64)).Q.T
    )
    assert sub.leading_directions(x.T @ x, basis, 6).shape == (32, 3)
    assert sub.leading_directions(x.T @ x, torch.eye(32), 6).shape == (32, 0)


def test_leading_directions_refuse_what_has_none(sub):
    with pytest.raises(sub.NonFiniteError, match="the matrix of the features holds NaN or infinity"):
        sub.leading_directions(torch.full((4, 4), torch.nan), torch.zeros(4, 0), 1)
