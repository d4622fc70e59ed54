"""Laws of the closed form: it solves its equation, nothing beats it at equal cost, its ends are exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.methods.closed_form import Kfac
from deltaguard.methods.interpolate import Interpolate
from deltaguard.methods.method import Curvature, Layer
from deltaguard.solvers import kfac, projection, ridge, solution, spectrum


def layer(seed, rows, columns, rank):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def moment(size):
        x = normal(size, rank) * torch.logspace(-2, 2, rank, dtype=torch.float64)
        return x @ x.T / rank

    return normal(rows, columns), normal(rows, columns), moment(columns), moment(rows)


LAYERS = st.builds(layer, st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))
MU = st.floats(1e-6, 1e4)


@given(LAYERS, MU)
def test_kfac_solves_its_equation(matrices, mu):
    aligned, finetuned, H, G = matrices
    kept = kfac(aligned, finetuned, H, G, mu=mu).weight - aligned
    residual = kept - (finetuned - aligned) + mu * G @ kept @ H
    scale = 1 + mu * float(torch.linalg.matrix_norm(G, 2) * torch.linalg.matrix_norm(H, 2))
    assert float(residual.abs().max()) <= 1e-9 * scale


@given(LAYERS, MU)
def test_ridge_is_the_inverse_written_out_and_kfac_with_the_identity(matrices, mu):
    aligned, finetuned, H, _ = matrices
    written = (finetuned - aligned) @ torch.linalg.inv(torch.eye(len(H), dtype=H.dtype) + mu * H)
    weight = ridge(aligned, finetuned, H, mu=mu).weight
    # The inverse is the less exact of the two: it loses as many digits as the condition number has.
    slack = 1e-8 + 1e-14 * mu * float(torch.linalg.matrix_norm(H, 2))
    torch.testing.assert_close(weight - aligned, written, rtol=1e-6, atol=slack)
    identity = torch.eye(len(aligned), dtype=H.dtype)
    torch.testing.assert_close(kfac(aligned, finetuned, H, identity, mu=mu).weight, weight)


@given(LAYERS, st.floats(1e-3, 1e2), st.integers(0, 10**6), st.floats(1e-4, 1.0))
def test_no_perturbation_at_equal_safety_cost_keeps_more(matrices, mu, seed, size):
    aligned, finetuned, H, G = matrices
    delta = finetuned - aligned
    kept = kfac(aligned, finetuned, H, G, mu=mu).weight - aligned

    def cost(change):
        return float(torch.trace(G @ change @ H @ change.T))

    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = kept + size * noise
    other *= math.sqrt(cost(kept) / cost(other)) if cost(other) > 0 else 1.0
    loss, others_loss = float((kept - delta).square().sum()), float((other - delta).square().sum())
    assert loss <= others_loss * (1 + 1e-9) + 1e-12


@given(LAYERS)
def test_the_ends_are_exact(matrices):
    aligned, finetuned, H, G = matrices
    for solve in (
        lambda mu: ridge(aligned, finetuned, H, mu=mu),
        lambda mu: kfac(aligned, finetuned, H, G, mu=mu),
    ):
        whole, none = solve(0.0), solve(math.inf)
        assert torch.equal(whole.weight, finetuned)
        assert torch.equal(none.weight, aligned)
        assert (whole.kept_energy, whole.utility_loss) == (1.0, 0.0)
        assert (none.kept_energy, none.safety_cost) == (0.0, 0.0)


@given(LAYERS, MU, st.floats(1.1, 10))
def test_a_higher_price_costs_less_safety_and_more_utility(matrices, mu, more):
    aligned, finetuned, H, G = matrices
    cheap, dear = (kfac(aligned, finetuned, H, G, mu=price) for price in (mu, mu * more))
    assert dear.detail["safety_kl_share"] <= cheap.detail["safety_kl_share"] + 1e-12
    assert dear.utility_loss >= cheap.utility_loss - 1e-12


@given(LAYERS, MU)
def test_the_reported_numbers_are_those_of_the_weight(matrices, mu):
    aligned, finetuned, H, G = matrices
    found = kfac(aligned, finetuned, H, G, mu=mu)
    delta, kept = finetuned - aligned, found.weight - aligned
    cost = torch.trace(kept @ H @ kept.T) / torch.trace(delta @ H @ delta.T)
    assert found.safety_cost == pytest.approx(float(cost), rel=1e-5, abs=1e-9)
    loss = (kept - delta).square().sum() / delta.square().sum()
    assert found.utility_loss == pytest.approx(float(loss), rel=1e-5, abs=1e-9)


def test_what_does_not_fit_is_refused():
    weight, H = torch.zeros(2, 3), torch.eye(3)
    with pytest.raises(ValueError, match="mu is -1"):
        ridge(weight, weight, H, mu=-1)
    with pytest.raises(ValueError, match=r"\(2, 2\) is needed"):
        kfac(weight, weight, H, H, mu=1)


def prepared(method, dtype):
    """A layer of 7 rows in half precision, of which both curvatures are cut off."""
    aligned, finetuned, H, G = (each.float() for each in layer(3, 7, 6, 9))
    curvature = Curvature(inputs=spectrum(H, 3), outputs=spectrum(G, 3))
    return method.prepare(
        Layer(aligned.to(dtype), finetuned.to(dtype), curvature=curvature), method.options()
    )


@pytest.mark.parametrize("price", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("method", [Kfac(), Interpolate()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_is_rounded_at_once_is_the_one_that_is_rounded_later(method, dtype, price):
    found = prepared(method, dtype)
    exact, rounded = found.at(price), found.rounded_at(price, dtype)
    assert exact.weight.dtype == torch.float32
    assert torch.equal(rounded.weight, exact.weight.to(dtype))
    assert (rounded.kept_energy, rounded.detail) == (exact.kept_energy, exact.detail)


@pytest.mark.parametrize("method", [Kfac(), Interpolate()])
def test_blocks_of_rows_give_what_the_whole_matrix_gives(method, monkeypatch):
    whole = prepared(method, torch.bfloat16).at(0.3)
    monkeypatch.setattr(solution, "ROW_BLOCK_ENTRIES", 15)
    monkeypatch.setattr(solution, "CACHED_ENTRIES", 7)
    monkeypatch.setattr(projection, "_LEAST_ROWS", 1)
    found = prepared(method, torch.bfloat16).at(0.3)
    torch.testing.assert_close(found.weight, whole.weight)
    assert found.detail == pytest.approx(dict(whole.detail), rel=1e-5)


@pytest.mark.parametrize("method", [Kfac(), Interpolate()])
@pytest.mark.parametrize("which", [0, 1])
def test_a_weight_that_is_not_finite_is_named(method, which):
    aligned, finetuned, H, G = (each.float() for each in layer(3, 7, 6, 9))
    (aligned, finetuned)[which][2, 3] = math.inf
    curvature = Curvature(inputs=spectrum(H, 3), outputs=spectrum(G, 3))
    with pytest.raises(ValueError, match=rf"The {('aligned', 'fine-tuned')[which]} weight holds 1 entries"):
        method.prepare(Layer(aligned, finetuned, curvature=curvature), method.options()).at(0.5)
