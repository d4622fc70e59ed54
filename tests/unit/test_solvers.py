"""Small facts about the factor, `interpolate` and `published`."""

import math
import sys

import pytest
import torch

from deltaguard.methods.greedy import GreedyOptions
from deltaguard.solvers import (
    factorise,
    greedy,
    interpolate,
    kfac,
    published,
    ridge,
    solution,
    spectrum,
)


def test_factor_reproduces_the_damped_curvature():
    torch.manual_seed(0)
    inputs = torch.randn(40, 9, dtype=torch.float64)
    hessian = inputs.T @ inputs / 40
    factor = factorise(hessian, dampening=0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped[factor.order][:, factor.order])
    torch.testing.assert_close(factor.inverse_diagonal, torch.linalg.inv(damped).diagonal())
    assert (factor.inverse_diagonal[factor.order].diff() >= 0).all()


def test_dampening_rises_in_recorded_steps_and_then_stops():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))
    assert factorise(indefinite, dampening=0.01).dampening == pytest.approx(0.1)
    with pytest.raises(ValueError, match="even with dampening 1"):
        factorise(torch.diag(torch.tensor([4.0, 1.0, 1.0, -3.0])), dampening=0.01)


def test_a_curvature_whose_inverse_cannot_be_factorised_is_refused_with_a_remedy(monkeypatch):
    factorised, calls = torch.linalg.cholesky_ex, []

    def fails_the_second_time(matrix, **options):
        calls.append(matrix)
        found = factorised(matrix, **options)
        return (found[0], torch.tensor(1)) if len(calls) == 2 else found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_the_second_time)
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="not positive definite with dampening"):
        published(weight, 2 * weight, torch.eye(3), strength=0.1)
    # The factor's dampening rises instead.
    calls.clear()
    assert factorise(torch.eye(3), dampening=0.01).dampening == pytest.approx(0.1)


def test_eigenvalues_that_a_device_does_not_find_are_found_in_float64(monkeypatch):
    decomposed, seen = torch.linalg.eigh, []

    def fails_in_float32(matrix):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return decomposed(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    found = spectrum(torch.diag(torch.tensor([1.0, 9.0, 4.0])), 1)
    assert (found.values.tolist(), found.vectors.dtype) == ([9.0], torch.float32)
    assert seen == [torch.float32, torch.float64]

    def fails(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(ValueError, match="eigenvalues cannot be found"):
        spectrum(torch.eye(3), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interpolation_is_exact_at_both_ends(dtype):
    torch.manual_seed(0)
    aligned, finetuned = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)
    assert torch.equal(interpolate(aligned, finetuned, alpha=0).weight.to(dtype), aligned)
    assert torch.equal(interpolate(aligned, finetuned, alpha=1).weight.to(dtype), finetuned)
    solution = interpolate(aligned, finetuned, alpha=0.25)
    torch.testing.assert_close(solution.weight, 0.75 * aligned.float() + 0.25 * finetuned.float())
    assert math.isnan(solution.safety_cost)
    assert solution.utility_loss == pytest.approx(0.75**2)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_interpolation_refuses_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        interpolate(torch.zeros(1, 1), torch.ones(1, 1), alpha=alpha)


SOLVERS = {
    "greedy": lambda a, f, H, G: greedy(a, f, H, strength=0.3),
    "published": lambda a, f, H, G: published(a, f, H, strength=3000.0),
    "ridge": lambda a, f, H, G: ridge(a, f, H, mu=0.5),
    "kfac": lambda a, f, H, G: kfac(a, f, H, G, mu=0.5),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_solver_leaves_its_inputs_computes_in_float32_and_says_what_it_kept(name, dtype):
    torch.manual_seed(0)
    aligned, finetuned = (torch.randn(12, 9).to(dtype) for _ in range(2))
    inputs, outputs = torch.randn(40, 9), torch.randn(40, 12)
    hessian, output_hessian = inputs.T @ inputs / 40, outputs.T @ outputs / 40
    given = (aligned, finetuned, hessian, output_hessian)
    before = [matrix.clone() for matrix in given]
    found = SOLVERS[name](*given)
    assert all(torch.equal(matrix, old) for matrix, old in zip(given, before, strict=True))
    assert found.weight.dtype == torch.float32
    same = SOLVERS[name](aligned.float(), finetuned.float(), hessian, output_hessian)
    assert torch.equal(found.weight, same.weight)
    whole, left = ((weight.double() - aligned.double()) for weight in (finetuned, found.weight))
    energy, H = whole.square().sum(), hessian.double()
    assert 0 < found.kept_energy < 1
    assert found.kept_energy == pytest.approx(float((left * whole).sum() / energy), rel=1e-4)
    assert found.utility_loss == pytest.approx(float((left - whole).square().sum() / energy), rel=1e-4)
    cost = float(((left @ H) * left).sum() / ((whole @ H) * whole).sum())
    assert found.safety_cost == pytest.approx(cost, rel=1e-4)


def test_published_keeps_at_most_85_percent_and_survives_dead_columns():
    torch.manual_seed(0)
    aligned, finetuned = torch.randn(16, 20), torch.randn(16, 20)
    inputs = torch.randn(50, 20)
    inputs[:, 3] = 0
    solution = published(aligned, finetuned, inputs.T @ inputs, strength=1e9)
    assert solution.kept_entries == 0.85
    assert solution.weight.isfinite().all()
    assert 0 < solution.safety_cost < 1


def test_published_selects_block_by_block():
    torch.manual_seed(1)
    aligned, finetuned = torch.randn(6, 10), torch.randn(6, 10)
    inputs = torch.randn(50, 10)
    hessian = inputs.T @ inputs
    whole = published(aligned, finetuned, hessian, strength=3000, block_size=10)
    blocks = published(aligned, finetuned, hessian, strength=3000, block_size=4)
    assert not torch.equal(whole.weight, blocks.weight)
    with pytest.raises(ValueError, match="block_size 0"):
        published(aligned, finetuned, hessian, strength=1, block_size=0)


def test_the_options_name_what_the_solver_knows():
    module, options = sys.modules[greedy.__module__], GreedyOptions.model_fields
    assert options["budget"].annotation == module.Budget
    assert options["compensation"].annotation == module.Compensation


@pytest.mark.parametrize("compensation", ["joint", "additive", "none"])
def test_blocks_of_rows_give_what_the_whole_matrix_gives(monkeypatch, compensation):
    """Three blocks of rows, the last one short, with a boundary column that is taken in part."""
    torch.manual_seed(2)
    aligned, finetuned = torch.randn(8, 5).double(), torch.randn(8, 5).double()
    inputs = torch.randn(40, 5).double()

    def solved():
        return (
            greedy(aligned, finetuned, inputs.T @ inputs, strength=0.37, compensation=compensation),
            interpolate(aligned, finetuned, alpha=0.3),
        )

    whole = solved()
    assert round(whole[0].kept_entries * aligned.numel()) % len(aligned) > 0
    for entries in ("ROW_BLOCK_ENTRIES", "CACHED_ENTRIES"):
        monkeypatch.setattr(solution, entries, 15)
    for one, other in zip(solved(), whole, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=1e-12)
        assert one.kept_entries == other.kept_entries
        assert one.utility_loss == pytest.approx(other.utility_loss, rel=1e-12)
        assert one.safety_cost == pytest.approx(other.safety_cost, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_is_found(value):
    matrix = torch.ones(3, 4)
    assert solution.is_finite(matrix)
    matrix[1, 2] = value
    assert not solution.is_finite(matrix)


def test_a_squared_norm_keeps_its_digits_over_millions_of_entries():
    torch.manual_seed(0)
    matrix = torch.randn(1500, 1500)
    assert solution.squared_norm(matrix) == pytest.approx(float(matrix.double().square().sum()), rel=1e-7)
