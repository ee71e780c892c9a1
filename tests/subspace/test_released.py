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
        extension = sub.released_llava_extend(basis, fixture[f"gradient/{layer}"], float(fixture["energy_threshold"]))
        assert_same_subspace(sub.append_directions(basis, extension.new), fixture[f"basis1/{layer}"].T)


def test_released_clip_takes_the_output_side(sub, with_spectrum):
    weight = with_spectrum(24, 24, torch.arange(1, 25, dtype=torch.float64) ** -1.0).float()
    left, _, _ = torch.linalg.svd(weight.double())
    found = sub.released_clip_weight_basis(weight, 0.85)
    assert_same_subspace(found.basis, left[:, : found.rank])
    assert found.energy < 0.85


def test_released_clip_refuses_what_only_square_layers_hide(sub):
    with pytest.raises(sub.ShapeError, match="only a square weight allows"):
        sub.released_clip_weight_basis(torch.randn(8, 6), 0.85)


def test_running_mean_needs_equal_batches(sub):
    mean = sub.RunningMeanFeatures()
    with pytest.raises(sub.ShapeError, match="no batch yet"):
        _ = mean.matrix
    mean.add(torch.randn(3, 2, 8))
    with pytest.raises(sub.ShapeError, match="drop the last batch"):
        mean.add(torch.randn(2, 2, 8))
