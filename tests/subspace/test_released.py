"""The released presets against numbers computed by the authors' released code."""

import pytest
import torch


def assert_same_subspace(basis, expected):
    assert basis.shape == expected.shape
    assert (basis.double() @ basis.double().T - expected.double() @ expected.double().T).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_released_clip_reproduces_every_basis(sub, parity, layer):
    fixture = parity("released_clip_subspace.npz")
    weight_energy, feature_energy = float(fixture["threshold_weight"]), float(fixture["threshold_feature"])
    basis = sub.released_clip_weight_basis(fixture[f"weight_{layer}"], weight_energy).basis
    assert_same_subspace(basis, fixture[f"basis0_{layer}"])
    for task in (1, 2):
        mean = sub.RunningMeanFeatures()
        for batch in fixture[f"task{task}_features_{layer}"]:
            mean.add(batch)
        assert torch.allclose(mean.matrix, fixture[f"task{task}_mean_{layer}"], atol=1e-7)
        basis = sub.append_directions(basis, sub.released_clip_extend(basis, mean.matrix, feature_energy).new)
        assert_same_subspace(basis, fixture[f"basis{task}_{layer}"])


def test_released_llava_reproduces_every_basis(sub, parity):
    fixture = parity("released_llava_subspace.npz")
    layers = [key.removeprefix("weight/") for key in fixture if key.startswith("weight/")]
    assert len(layers) == 2
    for layer in layers:
        basis = sub.released_llava_weight_basis(fixture[f"weight/{layer}"], 0.6).basis
        assert_same_subspace(basis, fixture[f"basis0/{layer}"].T)
        extension = sub.released_llava_extend(
            basis, fixture[f"gradient/{layer}"], float(fixture["energy_threshold"])
        )
        assert_same_subspace(sub.append_directions(basis, extension.new), fixture[f"basis1/{layer}"].T)


@pytest.mark.parametrize("preset", ["released_clip", "released_llava"])
def test_released_presets_keep_one_direction_where_the_strict_rule_would_keep_none(sub, parity, preset):
    fixture = parity(f"{preset}_subspace.npz")
    for name in [key for key in fixture if key.startswith("weight")]:
        weight = fixture[name].double()
        left, singular, right = torch.linalg.svd(weight)
        first = left[:, :1] if preset == "released_clip" else right[:1].T
        # The first direction alone holds more than this.
        energy = 0.5 * float(singular[0].square() / singular.square().sum())
        assert int((torch.cumsum(singular.square(), 0) / singular.square().sum() < energy).sum()) == 0
        found = getattr(sub, f"{preset}_weight_basis")(fixture[name], energy)
        assert found.rank == 1
        assert_same_subspace(found.basis, first.float())


def test_released_llava_directions_are_those_of_the_gradient_outside_the_basis(
    sub, with_spectrum, random_basis
):
    gradient, basis = with_spectrum(60, 80, 0.3 ** torch.arange(12.0)).float(), random_basis(80, 10)
    found = sub.released_llava_directions(gradient, basis, 4)
    outside = gradient.double() - gradient.double() @ basis.double() @ basis.double().T
    singular = torch.linalg.svdvals(outside)
    assert torch.allclose(found.singular_values.double(), singular[:4], rtol=0.02), (
        "blurred, as without oversampling"
    )
    energy = float(outside.square().sum())
    held = float((outside @ found.A.double()).square().sum()) / energy
    assert held == pytest.approx(float(singular[:4].square().sum()) / energy, abs=1e-3)
    assert found.captured == pytest.approx(held, abs=1e-3)
    assert found.residual_energy == pytest.approx(energy / float(gradient.double().square().sum()), rel=1e-5)


def test_released_llava_rounds_A_to_half_precision(sub, random_basis):
    basis, gradient = random_basis(80, 10), torch.randn(60, 80)
    found = sub.released_llava_directions(gradient, basis, 8)
    assert torch.equal(found.A, found.A.half().float())
    assert 1e-6 < sub.orthonormality_error(found.A) < 1e-3
    assert (basis.T @ found.A).abs().max() < 1e-3


def test_released_llava_is_reproducible_and_leaves_the_random_state_alone(sub, random_basis):
    basis, gradient, before = random_basis(30, 5), torch.randn(20, 30), torch.random.get_rng_state()
    first, second = (sub.released_llava_directions(gradient, basis, 4, seed=3) for _ in range(2))
    assert torch.equal(first.A, second.A) and torch.equal(torch.random.get_rng_state(), before)
    other = sub.released_llava_directions(gradient, basis, 4, seed=4)
    assert not torch.equal(first.A, other.A), "without oversampling the start shows"


def test_released_llava_makes_no_directions_up(sub, random_basis):
    basis = random_basis(30, 10)
    with pytest.raises(sub.RankError, match="only 0 direction"):
        sub.released_llava_directions(torch.randn(20, 10) @ basis.T, basis, 4)
    thin = torch.randn(20, 2) @ torch.randn(2, 30)
    assert sub.released_llava_directions(thin, basis, 4).A.shape == (30, 2)
    with pytest.raises(sub.NonFiniteError, match="the gradient holds NaN"):
        sub.released_llava_directions(torch.full((4, 30), float("nan")), basis, 2)


def test_released_clip_takes_the_output_side(sub, with_spectrum):
    weight = with_spectrum(24, 24, torch.arange(1, 25, dtype=torch.float64) ** -1.0).float()
    left, _, _ = torch.linalg.svd(weight.double())
    found = sub.released_clip_weight_basis(weight, 0.85)
    assert_same_subspace(found.basis, left[:, : found.rank])
    assert found.energy < 0.85


def test_released_clip_refuses_what_only_square_layers_hide(sub):
    with pytest.raises(sub.ShapeError, match="requires a square weight"):
        sub.released_clip_weight_basis(torch.randn(8, 6), 0.85)


def test_running_mean_needs_equal_batches(sub):
    mean = sub.RunningMeanFeatures()
    with pytest.raises(sub.ShapeError, match="no batch yet"):
        _ = mean.matrix
    mean.add(torch.randn(3, 2, 8))
    with pytest.raises(sub.ShapeError, match="drop the last batch"):
        mean.add(torch.randn(2, 2, 8))
