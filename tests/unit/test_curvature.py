"""Laws of sums over tokens, and of the packing of a sum with its factor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.curvature.contents import pack, unpack_factor, unpack_moment
from deltaguard.curvature.sums import Moment, RunningMoment, check_sum, merge, normalise
from deltaguard.errors import DeltaguardError
from deltaguard.solvers import factorise

SIZE = 6


@st.composite
def token_batches(draw):
    """Batches of whole-numbered inputs: their sums are exact, so that laws hold bit for bit."""
    rows = st.lists(st.lists(st.integers(-9, 9), min_size=SIZE, max_size=SIZE), min_size=1, max_size=5)
    batches = draw(st.lists(rows, min_size=1, max_size=4))
    return [torch.tensor(batch, dtype=torch.float32) for batch in batches]


def summed(batches, size=SIZE):
    running = RunningMoment(size)
    for batch in batches:
        running.add(batch)
    return running.taken()


def same(a: Moment, b: Moment) -> bool:
    return a.tokens == b.tokens and torch.equal(a.total, b.total)


@given(token_batches())
def test_the_sum_is_over_outer_products_of_tokens(batches):
    tokens = torch.cat(batches)
    expected = sum(torch.outer(x, x) for x in tokens)
    assert same(summed(batches), Moment(expected, len(tokens)))


@given(token_batches(), st.randoms())
def test_neither_order_nor_batching_matters(batches, random):
    shuffled = list(torch.cat(batches))
    random.shuffle(shuffled)
    assert same(summed(batches), summed([torch.stack(shuffled)]))


@given(token_batches(), token_batches(), token_batches())
def test_merging_is_addition(a, b, c):
    parts = [summed(a), summed(b), summed(c)]
    assert same(merge(parts), summed([*a, *b, *c]))
    assert same(merge([merge(parts[:2]), parts[2]]), merge(parts))
    assert same(merge([summed([]), parts[0]]), parts[0])


def test_a_sum_of_many_panels_is_the_whole_product():
    batches = [torch.randint(-9, 10, (tokens, 700)).float() for tokens in (3, 50)]
    found, tokens = summed(batches, 700), torch.cat(batches)
    assert same(found, Moment(tokens.T @ tokens, 53))


def test_a_sum_is_exactly_symmetric_whatever_is_rounded():
    total = summed([torch.randn(100, 300), torch.randn(7, 300)], 300).total
    assert torch.equal(total, total.T)


def test_half_precision_inputs_are_summed_in_float32():
    inputs = torch.full((300, 1), 100.0, dtype=torch.float16)  # the sum of squares, 3e6, has no float16
    moment = summed([inputs], 1)
    assert moment.total.dtype == torch.float32
    assert moment.total.item() == 3e6


@given(token_batches())
def test_the_mean_is_symmetric_and_packing_loses_nothing(batches):
    moment = summed(batches)
    if not moment.total.any():
        return
    hessian = normalise(moment)
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian, torch.cat(batches).T.cov(correction=0) + mean_outer(batches))
    packed = pack("layer", moment, dampening=0.01)
    assert same(unpack_moment(packed), moment)
    expected, found = factorise(hessian, dampening=0.01), unpack_factor(packed)
    for name in ("order", "lower", "inverse_diagonal"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.damping, found.dampening) == (expected.damping, expected.dampening)


def mean_outer(batches):
    mean = torch.cat(batches).mean(dim=0)
    return torch.outer(mean, mean)


def test_columns_that_no_token_reached_are_fine():
    moment = summed([torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 1.0]])], 3)
    factor = unpack_factor(pack("layer", moment, dampening=0.01))
    assert factor.inverse_diagonal[1] == pytest.approx(1 / factor.damping)


@pytest.mark.parametrize("what", ["inputs", "gradients"])
def test_a_sum_that_is_not_finite_is_an_error_that_names_the_layer(what):
    total = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0]])
    with pytest.raises(DeltaguardError, match=rf"`blocks.3.fc` holds 2 entries that are NaN .* {what} overf"):
        check_sum("blocks.3.fc", total, what)


@pytest.mark.parametrize("what", ["inputs", "gradients"])
def test_a_sum_of_zero_says_nothing_and_is_an_error(what):
    with pytest.raises(DeltaguardError, match=rf"`blocks.3.fc` is zero: its {what} are all zero"):
        check_sum("blocks.3.fc", torch.zeros(2, 2), what)


def test_a_sum_that_cannot_be_factorised_is_an_error_that_names_the_group():
    indefinite = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    with pytest.raises(DeltaguardError, match=r"`blocks.3.fc` is of no use: .*even with dampening 1"):
        pack("blocks.3.fc", Moment(indefinite, 7), dampening=0.01)
