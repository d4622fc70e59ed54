"""No closed form gives more than the delta it came from, and one that would is an error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.solvers import (
    Spectrum,
    closed_form,
    kfac,
    project,
    project_thin,
    ridge,
    solve_projected,
    spectrum,
)
from deltaguard.solvers.spectrum import _randomised

MU = st.floats(1e-9, 1e9)
SIDES = st.integers(1, 40)


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def basis(draw, size, share, decades, dtype):
    """A spectrum as a store holds it: vectors in their stored precision, values in float32."""
    rank = max(1, int(share * size))
    vectors = torch.linalg.qr(normal(draw, size, size))[0][:, :rank]
    values = torch.logspace(decades / 2, -decades / 2, rank + 1, dtype=torch.float64)
    return Spectrum(values[:-1].float(), vectors.to(dtype), float(values[-1]) if rank < size else 0.0)


def layer(seed, sides, share, decades, dtype, rank):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = sides
    inputs, outputs = (basis(draw, size, share, decades, dtype) for size in (columns, rows))
    return normal(draw, rows, rank).float(), normal(draw, rank, columns).float(), inputs, outputs


LAYERS = st.builds(
    layer,
    st.integers(0, 10**6),
    st.tuples(SIDES, SIDES),
    st.sampled_from([0.2, 0.6, 1.0]),
    st.floats(0, 12),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.integers(1, 3),
)


def results(up, down, inputs, outputs, mu):
    """The restored delta, by every way there is."""
    aligned, delta = torch.zeros(len(up), down.shape[1]), up @ down
    whole, thin = project(delta, inputs, outputs), project_thin(up, down, inputs, outputs)
    yield closed_form(aligned, delta, inputs, outputs, mu=mu).weight
    for projection in (whole, thin):
        yield projection.restored(mu)
        yield solve_projected(aligned, delta, projection, mu=mu).weight
    factors = thin.factors(mu)
    if factors is not None:
        yield factors.up @ factors.down


@given(LAYERS, MU)
def test_with_orthonormal_vectors_nothing_grows_and_nothing_is_refused(made, mu):
    norm = float((made[0].double() @ made[1].double()).norm())
    for restored in results(*made, mu):
        assert float(restored.double().norm()) <= norm * 1.001 + 1e-5


def scaled(found, factor):
    return Spectrum(found.values, found.vectors.float() * factor, found.tail)


@given(LAYERS, MU, st.sampled_from(["inputs", "outputs", "both"]))
def test_vectors_that_are_scaled_are_always_refused(made, mu, which):
    up, down, inputs, outputs = made
    inputs = inputs if which == "outputs" else scaled(inputs, 60_000.0)
    outputs = outputs if which == "inputs" else scaled(outputs, 60_000.0)
    for solve in (
        lambda: closed_form(torch.zeros_like(up @ down), up @ down, inputs, outputs, mu=mu),
        lambda: project(up @ down, inputs, outputs),
        lambda: project_thin(up, down, inputs, outputs),
    ):
        with pytest.raises(ValueError, match="not orthonormal"):
            solve()


@pytest.mark.parametrize("factor", [1.02, 1.5])
def test_vectors_that_are_a_little_too_long_are_refused_where_they_hold_the_delta(factor):
    draw = torch.Generator().manual_seed(0)
    up, down = normal(draw, 6, 2).float(), normal(draw, 2, 5).float()
    outputs, inputs = basis(draw, 6, 1.0, 4, torch.float32), basis(draw, 5, 1.0, 4, torch.float32)
    for bad in ((scaled(inputs, factor), outputs), (inputs, scaled(outputs, factor))):
        with pytest.raises(ValueError, match="not orthonormal"):
            project(up @ down, *bad)
        with pytest.raises(ValueError, match="not orthonormal"):
            project_thin(up, down, *bad)


def test_arithmetic_that_makes_more_of_a_delta_is_refused(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    up, down = normal(draw, 40, 1).float(), normal(draw, 1, 30).float()
    inputs, outputs = basis(draw, 30, 0.5, 2, torch.float32), basis(draw, 40, 0.5, 2, torch.float32)
    for projection in (project(up @ down, inputs, outputs), project_thin(up, down, inputs, outputs)):
        assert projection.restored(1.0).isfinite().all()
        for name in ("vectors", "values"):
            # In memory of its own, as a faulty device would: after the projection was made.
            getattr(projection.inputs, name).mul_(-50.0)
        with pytest.raises(ValueError, match="larger than the delta"):
            projection.restored(1.0)
        for name in ("vectors", "values"):
            getattr(projection.inputs, name).div_(-50.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("where", ["values", "tail"])
def test_eigenvalues_that_are_none_are_refused(value, where):
    found = spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    values = found.values.clone()
    values[1] = value if where == "values" else values[1]
    bad = Spectrum(values, found.vectors, value if where == "tail" else found.tail)
    good, delta = spectrum(torch.eye(3)), torch.ones(3, 3)
    for inputs, outputs in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="eigenvalue"):
            closed_form(torch.zeros(3, 3), delta, inputs, outputs, mu=1.0)
        with pytest.raises(ValueError, match="eigenvalue"):
            project_thin(delta[:, :1], delta[:1], inputs, outputs)


@given(st.integers(0, 10**6), st.integers(2, 8), MU)
def test_a_curvature_that_is_negative_is_refused(seed, size, mu):
    x = normal(torch.Generator().manual_seed(seed), size, 3 * size)
    H, zero, delta = x @ x.T, torch.zeros(size, size), torch.ones(size, size)
    for solve in (
        lambda: ridge(zero, delta, -H, mu=mu),
        lambda: kfac(zero, delta, -H, H, mu=mu),
        lambda: kfac(zero, delta, H, -H, mu=mu),
        lambda: ridge(zero, delta, H - float(H.trace()) * torch.eye(size), mu=mu),
    ):
        with pytest.raises(ValueError, match="not positive semi-definite"):
            solve()
    for wrong in (-mu, math.nan):
        with pytest.raises(ValueError, match="mu is"):
            ridge(zero, delta, H, mu=wrong)


@pytest.mark.parametrize("spoil", [lambda H: -H, lambda H: H - 0.3 * H.diagonal().max() * torch.eye(len(H))])
def test_a_large_curvature_that_is_negative_is_refused(spoil):
    x = normal(torch.Generator().manual_seed(0), 300, 900)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        _randomised(spoil(x @ x.T / 900), 20)
