"""Laws of the low-rank form of a delta: nothing of its rank is closer, and what it loses is what it says."""

import contextlib
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaguard.solvers.low_rank import low_rank, low_rank_of_factors

# Under `deltaguard.solvers` the function may stand in the module's place.
MODULE = importlib.import_module("deltaguard.solvers.low_rank")
SIDES = st.integers(1, 12)
SEEDS = st.integers(0, 10**6)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(seed, rows, columns, falling):
    """A matrix whose singular values are falling, falling², ..."""
    size = min(rows, columns)
    left, right = (torch.linalg.qr(normal(seed + i, side, size))[0] for i, side in enumerate((rows, columns)))
    return left * falling ** torch.arange(1, size + 1, dtype=torch.float64) @ right.T


DELTAS = st.builds(normal, SEEDS, SIDES, SIDES)
DECAYING = st.builds(decaying, SEEDS, SIDES, SIDES, st.floats(0.2, 0.95))


def lost(found, delta):
    whole = float(delta.square().sum())
    return float((found.up @ found.down - delta).square().sum()) / whole if whole else 0.0


@given(DELTAS | DECAYING, SIDES)
def test_it_loses_what_eckart_and_young_say_that_any_matrix_of_its_rank_must(delta, rank):
    found = low_rank(delta, rank=rank)
    sigma = np.linalg.svd(delta.numpy(), compute_uv=False)
    assert found.residual == pytest.approx((sigma[rank:] ** 2).sum() / (sigma**2).sum(), abs=1e-12)
    assert found.down.shape == (min(rank, *delta.shape), delta.shape[1])
    assert found.up.shape == (delta.shape[0], min(rank, *delta.shape))


@given(DELTAS | DECAYING, SIDES)
def test_the_residual_is_that_of_the_factors(delta, rank):
    found = low_rank(delta, rank=rank)
    assert found.residual >= 0
    assert found.residual == pytest.approx(lost(found, delta), abs=1e-12)


@given(DELTAS | DECAYING, SIDES, SEEDS, st.floats(1e-3, 1.0))
def test_no_other_product_of_that_rank_is_closer(delta, rank, seed, size):
    found = low_rank(delta, rank=rank)
    up = found.up + size * normal(seed, *found.up.shape)
    down = found.down + size * normal(seed + 1, *found.down.shape)
    assert float((up @ down - delta).square().sum()) >= found.residual * float(delta.square().sum()) - 1e-9


@given(DELTAS | DECAYING)
def test_a_higher_rank_loses_less_and_the_highest_nothing(delta):
    residuals = [low_rank(delta, rank=rank).residual for rank in range(1, min(delta.shape) + 1)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] == 0


@given(SEEDS, SIDES, SIDES, st.integers(1, 5))
def test_a_delta_of_low_rank_is_reproduced(seed, rows, columns, rank):
    delta = normal(seed, rows, rank) @ normal(seed + 1, rank, columns)
    found = low_rank(delta, rank=rank)
    assert found.residual <= 1e-24
    torch.testing.assert_close(found.up @ found.down, delta, rtol=0, atol=1e-11)
    assert len(low_rank(delta, rank=None, tolerance=1e-20).down) <= rank


@given(DELTAS | DECAYING, st.floats(0, 0.99))
def test_the_automatic_rank_is_the_smallest_within_the_tolerance(delta, tolerance):
    found = low_rank(delta, rank=None, tolerance=tolerance)
    rank = len(found.down)
    assert found.residual <= tolerance
    assert rank >= 1
    assert rank == 1 or low_rank(delta, rank=rank - 1).residual > tolerance


@given(DELTAS | DECAYING)
def test_the_factors_are_balanced(delta):
    found = low_rank(delta, rank=3)
    torch.testing.assert_close(found.up.T @ found.up, found.down @ found.down.T, rtol=0, atol=1e-9)


@given(SEEDS, SIDES, SIDES, st.integers(1, 15), st.none() | SIDES)
def test_factors_give_what_their_product_gives(seed, rows, columns, inner, rank):
    up, down = normal(seed, rows, inner), normal(seed + 1, inner, columns)
    found, whole = low_rank_of_factors(up, down, rank=rank), low_rank(up @ down, rank=rank)
    assert found.residual == pytest.approx(whole.residual, abs=1e-12)
    torch.testing.assert_close(found.up @ found.down, whole.up @ whole.down, rtol=0, atol=1e-7)
    assert len(found.down) == (len(whole.down) if rank is None else min(rank, rows, columns, inner))


@given(SEEDS, st.integers(40, 60), st.integers(40, 60), st.floats(0.3, 0.7), st.integers(1, 8))
def test_sketches_agree_with_the_exact_decomposition(seed, rows, columns, falling, rank):
    delta = decaying(seed, rows, columns, falling)
    exact = low_rank(delta, rank=rank)
    with sketching():
        found, again = low_rank(delta, rank=rank), low_rank(delta, rank=rank)
    assert torch.equal(found.up, again.up)
    assert found.residual == pytest.approx(lost(found, delta), abs=1e-12)
    assert found.residual == pytest.approx(exact.residual, rel=1e-6, abs=1e-12)
    torch.testing.assert_close(found.up @ found.down, exact.up @ exact.down, rtol=0, atol=1e-6)


@given(SEEDS, st.floats(0.05, 0.98), st.floats(1e-6, 0.5))
def test_the_automatic_rank_of_a_sketch_is_that_of_the_exact_decomposition(seed, falling, tolerance):
    delta = decaying(seed, 60, 70, falling)
    exact = low_rank(delta, rank=None, tolerance=tolerance)
    with sketching():
        found = low_rank(delta, rank=None, tolerance=tolerance)
    assert found.residual <= tolerance
    assert found.residual == pytest.approx(lost(found, delta), abs=1e-12)
    assert len(exact.down) <= len(found.down) <= len(exact.down) + 1


@contextlib.contextmanager
def sketching():
    """Small matrices are decomposed as large ones are, from a first sketch of 12 directions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_EXACT_SIDE", 8)
        patch.setattr(MODULE, "_FIRST_SKETCH", 12)
        yield


@settings(max_examples=3)
@given(SEEDS)
def test_large_deltas_are_sketched_and_the_global_generator_is_left_alone(seed):
    torch.manual_seed(seed)
    expected = torch.rand(1)
    torch.manual_seed(seed)
    delta = (normal(seed, 1100, 6) @ normal(seed + 1, 6, 1050)).float()
    for found in (low_rank(delta, rank=8), low_rank(delta, rank=None, tolerance=1e-6)):
        assert found.residual <= 1e-6
        assert lost(found, delta) <= 1e-10
    assert torch.equal(torch.rand(1), expected)
    assert len(low_rank(delta, rank=None, tolerance=1e-5).down) <= 6


def test_a_delta_of_zero_has_rank_zero_and_loses_nothing():
    zero = torch.zeros(3, 5)
    found = low_rank(zero, rank=None)
    assert (found.up.shape, found.down.shape, found.residual) == ((3, 0), (0, 5), 0.0)
    kept = low_rank(zero, rank=2)
    assert not (kept.up @ kept.down).any()
    assert (kept.down.shape, kept.residual) == ((2, 5), 0.0)
    nothing = low_rank_of_factors(found.up, found.down, rank=None)
    assert (nothing.up.shape, nothing.residual) == ((3, 0), 0.0)
    with sketching():
        assert low_rank(torch.zeros(30, 40), rank=None).residual == 0


def test_half_precision_is_decomposed_in_float32():
    delta = normal(0, 6, 4).to(torch.bfloat16)
    found = low_rank(delta, rank=4)
    assert found.up.dtype == found.down.dtype == torch.float32
    torch.testing.assert_close(found.up @ found.down, delta.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("delta", "options", "message"),
    [
        (torch.ones(2, 2), {"rank": 0}, "rank is 0"),
        (torch.ones(2, 2), {"rank": -3}, "rank is -3"),
        (torch.ones(2, 2), {"rank": None, "tolerance": 1.0}, "tolerance is 1.0"),
        (torch.ones(2, 2), {"rank": None, "tolerance": math.nan}, "tolerance is nan"),
        (torch.ones(2), {"rank": 1}, "a matrix is needed"),
        (torch.tensor([[math.inf]]), {"rank": 1}, "infinite"),
    ],
)
def test_what_makes_no_sense_is_refused(delta, options, message):
    with pytest.raises(ValueError, match=message):
        low_rank(delta, **options)
    with pytest.raises(ValueError, match=message):
        low_rank_of_factors(delta, delta, **options)


def test_factors_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 3\)"):
        low_rank_of_factors(torch.ones(2, 3), torch.ones(2, 3), rank=1)
