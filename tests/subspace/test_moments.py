"""Streamed second moments against X^T X in float64."""

import pytest
import torch


def test_stream_equals_the_stacked_product(sub):
    batches = [torch.randn(4, 7, 24) for _ in range(5)] + [torch.randn(3, 24)]
    moment = sub.SecondMoment(24)
    for batch in batches:
        moment.add(batch)
    rows = torch.cat([batch.reshape(-1, 24) for batch in batches]).double()
    assert moment.count == len(rows)
    assert torch.allclose(moment.matrix.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_mask_leaves_padding_out(sub):
    x, mask = torch.randn(4, 7, 24), torch.rand(4, 7) > 0.4
    moment = sub.SecondMoment(24)
    moment.add(x, mask)
    rows = x[mask].double()
    assert moment.count == len(rows)
    assert torch.allclose(moment.matrix.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    moment.add(x, torch.zeros(4, 7, dtype=torch.bool))
    assert moment.count == len(rows)


def test_masked_nan_does_not_leak(sub):
    x = torch.randn(2, 3, 8)
    x[0, 0] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = False
    moment = sub.SecondMoment(8)
    moment.add(x, mask)
    assert torch.isfinite(moment.matrix).all()


def test_merge_equals_one_stream(sub):
    first, second, whole = (sub.SecondMoment(16) for _ in range(3))
    a, b = torch.randn(9, 16), torch.randn(5, 16)
    first.add(a), second.add(b), whole.add(a), whole.add(b)
    first.merge(second)
    assert first.count == whole.count == 14
    assert torch.allclose(first.matrix, whole.matrix)
    empty = sub.SecondMoment(16)
    empty.merge(second)
    empty.merge(sub.SecondMoment(16))
    assert torch.equal(empty.matrix, second.matrix)
    empty.add(a)
    assert not torch.equal(empty.matrix, second.matrix), "merging copied, so the other stream stays as it was"


def test_many_batches_do_not_round_each_other_away(sub):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * 0.1 + 1.0
    exact = x.double().T @ x.double() * 4000
    wide, narrow = sub.SecondMoment(32), sub.SecondMoment(32, torch.float32)
    for _ in range(4000):
        wide.add(x)
        narrow.add(x)
    error = [float((m.matrix.double() - exact).abs().max() / exact.abs().max()) for m in (wide, narrow)]
    assert error[0] < 2e-7 and error[1] > 3 * error[0], (
        "a float32 buffer drifts, which is why float64 is the default"
    )


def test_no_graph_is_kept_and_half_precision_is_widened(sub):
    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    moment = sub.SecondMoment(8)
    moment.add(x)
    assert not moment.matrix.requires_grad
    rows = x.detach().double()
    assert torch.allclose(moment.matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_before_the_first_row_the_moment_is_zero(sub):
    assert torch.equal(sub.SecondMoment(3).matrix, torch.zeros(3, 3, dtype=torch.float64))


def test_misfits_are_named(plain):
    moment = plain.SecondMoment(8)
    with pytest.raises(plain.ShapeError, match="second moments of width 8 got features of shape"):
        moment.add(torch.randn(2, 9))
    with pytest.raises(plain.ShapeError, match="can't be merged"):
        moment.merge(plain.SecondMoment(9))
    with pytest.raises(plain.ShapeError, match="a mask of shape"):
        moment.add(torch.randn(2, 3, 8), torch.ones(2, 1, dtype=torch.bool))
