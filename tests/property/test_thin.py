"""Laws of the closed form of thin deltas: it is the closed form of the matrix that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaguard.solvers import LowRank, Spectrum, closed_form, project, project_thin, solve_projected
from deltaguard.solvers.thin import separable

PRICES = st.floats(1e-12, 1e12)
SEEDS = st.integers(0, 10**6)
MU = st.floats(1e-6, 1e6)


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def cut_off(draw, size, rank, decades):
    vectors = torch.linalg.qr(normal(draw, size, size))[0][:, :rank]
    values = torch.logspace(0, -decades, rank + 1, dtype=torch.float64)
    return Spectrum(values[:-1], vectors, float(values[-1]) if rank < size else 0.0)


def thin_layer(seed, rows, columns, rank, decades, kept):
    draw = torch.Generator().manual_seed(seed)
    up, down = normal(draw, rows, rank), normal(draw, rank, columns)
    inputs = cut_off(draw, columns, max(1, int(kept * columns)), decades)
    return up, down, inputs, cut_off(draw, rows, max(1, int(kept * rows)), decades)


# Sides of 90 and a rank of 1 leave room for the products of a whole sum.
LAYERS = st.builds(
    thin_layer,
    SEEDS,
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 4),
    st.floats(0, 6),
    st.sampled_from([0.3, 1.0]),
)


@settings(max_examples=30)
@given(st.lists(PRICES | st.just(0.0), min_size=1), st.lists(PRICES | st.just(0.0), min_size=1), PRICES)
def test_the_sum_of_products_is_the_factor_of_every_price(g, h, mu):
    g, h = (torch.tensor(values, dtype=torch.float64) for values in (g, h))
    left, right = separable(g, h, mu)
    assert float((left @ right.T - 1 / (1 + mu * torch.outer(g, h))).abs().max()) <= 3e-6


@given(LAYERS, MU)
def test_it_is_the_closed_form_of_the_whole_matrix(layer, mu):
    up, down, inputs, outputs = layer
    aligned = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
    whole = closed_form(aligned, up @ down, inputs, outputs, mu=mu)
    found = solve_projected(aligned, up @ down, project_thin(up, down, inputs, outputs), mu=mu)
    scale = float((up @ down).norm())
    torch.testing.assert_close(found.weight, whole.weight, rtol=0, atol=2e-5 * scale)
    for name in ("kept_energy", "safety_cost", "utility_loss"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6, abs=1e-9)
    assert dict(found.detail) == pytest.approx(dict(whole.detail), rel=1e-6)


@given(LAYERS, MU, st.sampled_from([torch.float64, torch.float32]))
def test_as_a_product_it_is_what_it_is_as_a_matrix(layer, mu, dtype):
    up, down, inputs, outputs = layer
    exact = project(up @ down, inputs, outputs).restored(mu)
    thin = project_thin(up.to(dtype), down.to(dtype), inputs, outputs)
    factors = thin.factors(mu)
    found = thin.restored(mu) if factors is None else factors.up @ factors.down
    slack = 1e-9 if factors is None and dtype == torch.float64 else 2e-5 * float((up @ down).norm())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=slack)


@pytest.mark.parametrize("kept", [0.3, 1.0])
def test_a_thin_delta_stays_thin(kept):
    up, down, inputs, outputs = thin_layer(0, 90, 80, 1, 4, kept)
    assert project_thin(up, down, inputs, outputs).factors(1e3) is not None


def test_at_its_ends_it_is_the_delta_and_nothing():
    up, down, inputs, outputs = thin_layer(0, 6, 5, 2, 3, 0.5)
    thin = project_thin(up, down, inputs, outputs)
    whole, nothing = thin.factors(0.0), thin.factors(float("inf"))
    assert isinstance(whole, LowRank)
    assert torch.equal(whole.up, up)
    assert torch.equal(whole.down, down)
    assert nothing is not None
    assert torch.equal(nothing.up @ nothing.down, torch.zeros(6, 5, dtype=torch.float64))
