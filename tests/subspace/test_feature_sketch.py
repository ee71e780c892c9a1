"""Sketched feature statistics against the exact second moment in float64."""

import pytest
import torch


def features(rows, dim, decay, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return ((x * torch.arange(1, dim + 1, dtype=torch.float64) ** -decay) @ mix).float()


def fed(sketch, x):
    for batch in x.split(64):
        sketch.add(batch)
    return sketch


def held(x, *bases):
    """Share of the features' energy inside orthonormal columns."""
    x = x.double()
    return sum(float((x @ basis.double()).square().sum()) for basis in bases) / float(x.square().sum())


def test_batches_masks_and_processes_add_up(sub, random_basis):
    basis, x = random_basis(24, 4), torch.randn(6, 7, 24)
    mask = torch.rand(6, 7) > 0.4
    masked, plain, first, second = (sub.SketchedMoment(24, 8, basis) for _ in range(4))
    x[~mask] = float("nan")
    masked.add(x, mask)
    plain.add(x[mask])
    assert torch.equal(masked.image, plain.image) and masked.count == int(mask.sum())
    rows = x[mask]
    first.add(rows[:9]), second.add(rows[9:])
    reduced = [one + other for one, other in zip(first.tensors, second.tensors)]
    first.merge(second)
    for merged, summed, straight in zip(first.tensors, reduced, plain.tensors):
        assert torch.equal(merged, summed) and torch.allclose(merged, straight, rtol=1e-5, atol=1e-5)
    assert first.count == plain.count
    moment = rows.double().T @ rows.double()
    assert torch.allclose(plain.image, moment @ plain.test.double(), atol=1e-4)


def test_the_energies_are_exact(sub, random_basis):
    basis, x = random_basis(40, 10), features(300, 40, 0.3)
    sketch = fed(sub.SketchedMoment(40, 8, basis), x)
    assert float(sketch.totals[1]) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    share, error = sketch.inside
    assert share == pytest.approx(held(x, basis), rel=1e-5) and error == 0.0


def test_the_share_inside_the_basis_is_estimated_from_some_of_many_rows_with_a_true_error(sub, random_basis):
    basis, misses = random_basis(24, 6), []
    for seed in range(12):
        x = features(9000, 24, 0.5, seed)
        share, error = fed(sub.SketchedMoment(24, 8, basis), x).inside
        assert 0.0 < error < 0.02
        misses.append((share - held(x, basis)) / error)
    assert max(map(abs, misses)) < 4 and 0.4 < (sum(m * m for m in misses) / len(misses)) ** 0.5 < 1.6


@pytest.mark.parametrize("decay", [0.3, 1.5])
@pytest.mark.parametrize("protected", [0, 12])
def test_a_sketch_as_large_as_the_complement_is_exact(sub, random_basis, decay, protected):
    x, basis = features(300, 48, decay), random_basis(48, protected, seed=5)
    exact = fed(sub.SecondMoment(48), x).directions(basis, 0.95)
    found = fed(sub.SketchedMoment(48, 100, basis), x).directions(basis, 0.95)
    assert found.rank == found.fewest == exact.rank and found.reached and found.missed < 1e-5
    assert found.energy_before == pytest.approx(exact.energy_before, abs=1e-6)
    assert found.energy_after == pytest.approx(exact.energy_after, abs=1e-5)
    difference = found.new.double() @ found.new.double().T - exact.new.double() @ exact.new.double().T
    assert difference.abs().max() < 1e-3


def test_features_of_rank_below_the_size_are_exact(sub, random_basis):
    x, basis = torch.randn(200, 10) @ torch.randn(10, 80), random_basis(80, 6)
    found = fed(sub.SketchedMoment(80, 16, basis), x).directions(basis, 1.0 - 1e-5)
    assert found.rank == 10 and found.reached and found.missed < 1e-5
    assert held(x, basis, found.new) > 1 - 1e-5


@pytest.mark.parametrize("decay", [0.5, 0.8, 1.5])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_the_sketch_claims_is_a_bound(sub, random_basis, decay, passes):
    x, basis = features(600, 200, decay), random_basis(200, 30, seed=5)
    exact = fed(sub.SecondMoment(200), x)
    for energy in (0.5, 0.7, 0.9):
        sketch = fed(sub.SketchedMoment(200, 80, basis), x)
        found = (fed(sketch.refined(), x) if passes == 2 else sketch).directions(basis, energy)
        truth = exact.directions(basis, energy)
        assert isinstance(found, sub.FeatureDirections) and found.rank == found.new.shape[1]
        assert found.energy_after <= held(x, basis, found.new) + 1e-6, (
            "the directions hold at least what is claimed"
        )
        assert found.fewest <= truth.rank, "the exact statistic needs no fewer than stated"
        if found.reached:
            assert held(x, basis, found.new) >= energy - 1e-6 and truth.rank <= found.rank
        else:
            assert found.energy_after < energy and found.rank == 80
        assert sub.orthonormality_error(torch.cat([basis, found.new], dim=1)) < 1e-6


@pytest.mark.parametrize("decay", [0.3, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("least", [0.002, 0.01, 0.05])
def test_directions_above_a_least_energy_are_all_there_where_the_sketch_is_sure(
    sub, random_basis, decay, least
):
    x, basis = features(600, 200, decay), random_basis(200, 30, seed=5)
    truth = fed(sub.SecondMoment(200), x).directions(basis, 1.0, least=least).rank
    first = fed(sub.SketchedMoment(200, 48, basis), x)
    one, two = (sketch.directions(basis, 1.0, least=least) for sketch in (first, fed(first.refined(), x)))
    assert one.rank <= two.rank <= truth, "only what certainly exceeds the least energy is taken"
    assert all(found.rank == truth or not found.reached for found in (one, two))
    assert two.reached or decay < 1.5, "a steep spectrum leaves nothing unsure"


def test_a_sketch_that_holds_all_directions_above_a_least_energy_says_so_and_one_that_may_not_does_not(sub):
    empty, x = torch.zeros(64, 0), torch.randn(300, 6) @ torch.randn(6, 64)
    assert fed(sub.SketchedMoment(64, 16, empty), x).directions(empty, 1.0, least=0.01).reached
    flat = torch.randn(900, 64)
    found = fed(sub.SketchedMoment(64, 16, empty), flat).directions(empty, 1.0, least=0.01)
    assert found.rank <= 16 and not found.reached, "all 64 directions exceed a hundredth, the sketch has 16"


def test_a_second_pass_reaches_what_one_does_not_and_needs_fewer_directions(sub, random_basis):
    x, basis = features(600, 200, 0.8), random_basis(200, 30, seed=5)
    first = fed(sub.SketchedMoment(200, 60, basis), x)
    one, two = first.directions(basis, 0.9), fed(first.refined(), x).directions(basis, 0.9)
    truth = fed(sub.SecondMoment(200), x).directions(basis, 0.9).rank
    assert two.missed < one.missed and two.reached
    assert truth <= two.rank <= truth + 1 and two.rank < one.rank
    larger = fed(sub.SketchedMoment(200, 30, basis), x).directions(basis, 0.9)
    assert not larger.reached and larger.rank == 30


def test_the_missed_energy_stays_below_the_theorem_on_average(plain, random_basis):
    x, basis, size = features(400, 100, 0.7), random_basis(100, 10), 24
    outside = x.double() - x.double() @ basis.double() @ basis.double().T
    eigenvalues = torch.linalg.svdvals(outside).square()
    bound = min((1 + p / (size - p - 1)) * float(eigenvalues[p:].sum()) for p in range(size - 1))
    total = float(x.double().square().sum())
    missed = [
        fed(plain.SketchedMoment(100, size, basis, seed=seed), x).directions(basis, 1.0).missed
        for seed in range(12)
    ]
    assert float(eigenvalues[size:].sum()) / total < sum(missed) / len(missed) < bound / total


def test_features_inside_the_basis_add_nothing(sub, random_basis):
    basis = random_basis(32, 8)
    found = fed(sub.SketchedMoment(32, 6, basis), torch.randn(100, 8) @ basis.T).directions(basis, 0.99)
    assert (
        found.rank == found.fewest == 0
        and found.reached
        and found.energy_before == pytest.approx(1.0, abs=1e-5)
    )
    empty = sub.SketchedMoment(32, 6, basis).directions(basis, 0.99)
    assert empty.rank == 0 and empty.energy_before == 1.0


def test_a_full_basis_leaves_nothing_to_sketch(sub, random_basis):
    basis = random_basis(16, 16)
    found = fed(sub.SketchedMoment(16, 6, basis), torch.randn(50, 16)).directions(basis, 0.99)
    assert found.rank == 0 and found.reached
    whole = fed(sub.SketchedMoment(16, 6, basis), torch.randn(50, 16)).directions(basis, 1.0)
    assert whole.rank == 0 and whole.reached, "rounding of the energies asks for no direction"


def test_a_second_pass_over_few_features_stays_outside_the_basis(sub, random_basis):
    x, basis = torch.randn(200, 3) @ torch.randn(3, 40), random_basis(40, 25)
    second = fed(fed(sub.SketchedMoment(40, 12, basis), x).refined(), x)
    assert (basis.T @ second.test).abs().max() < 1e-6, (
        "though three directions can't span twelve test vectors"
    )
    found = second.directions(basis, 0.999)
    assert found.rank == 3 and found.missed < 1e-4 and held(x, basis, found.new) > 0.999


def test_the_sampled_rows_keep_no_batch_alive(sub, random_basis):
    x = torch.randn(5000, 40)
    sketch = sub.SketchedMoment(40, 8, random_basis(40, 5))
    for piece in (x[:10], x[10:4000], x[4000:]):
        sketch.add(piece)
    held = sum(rows.untyped_storage().nbytes() for rows in sketch._sample.rows)
    assert held <= 2 * 512 * 40 * 4
    assert (
        torch.equal(torch.cat(sketch._sample.rows), x[:: sketch._sample.stride])
        and sketch._sample.stride == 8
    )


def test_every_statistic_answers_alike(sub, random_basis):
    basis, x = random_basis(64, 6), features(300, 64, 1.5)
    for empty in (
        sub.SecondMoment(64),
        sub.SecondMoment(64, torch.float32),
        sub.SketchedMoment(64, 21, basis),
    ):
        statistic = fed(empty, x)
        assert all(torch.isfinite(buffer).all() for buffer in statistic.tensors)
        found = statistic.directions(basis, 0.9)
        assert held(x, basis, found.new) >= 0.9 - 1e-6


def test_misfits_are_named(plain, random_basis):
    sketch = plain.SketchedMoment(8, 4, random_basis(8, 2))
    with pytest.raises(plain.ShapeError, match="width 8 got features of shape"):
        sketch.add(torch.randn(2, 9))
    with pytest.raises(plain.ShapeError, match="a mask of shape"):
        sketch.add(torch.randn(2, 3, 8), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(plain.ShapeError, match="other test vectors"):
        sketch.merge(plain.SketchedMoment(8, 4, random_basis(8, 2), seed=1))
    with pytest.raises(
        plain.ShapeError, match="basis must be the one that the feature sketch was created with"
    ):
        sketch.directions(random_basis(8, 2, seed=9), 0.9)
    with pytest.raises(plain.EnergyError):
        sketch.directions(sketch.basis, 0.0)
    sketch.add(torch.full((1, 8), float("nan")))
    with pytest.raises(plain.NonFiniteError, match="second moment of the features"):
        sketch.directions(sketch.basis, 0.9)


def test_a_limit_keeps_the_strongest_directions_and_asks_for_no_second_pass(sub, random_basis):
    basis, x = random_basis(40, 10), features(300, 40, 0.3)
    sketch = fed(sub.SketchedMoment(40, 20, basis), x)
    free, cut = sketch.directions(basis, 0.9), sketch.directions(basis, 0.9, limit=4)
    assert free.rank > 4 == cut.rank == cut.new.shape[1] and cut.reached
    assert float((cut.new.T @ free.new[:, :4]).square().sum()) == pytest.approx(4, abs=1e-4)
    assert cut.energy_after <= held(x, basis, cut.new) + 1e-5
    assert not free.reached, "without a limit this sketch is too small"
    assert cut.energy_after < free.energy_after < 0.9
