"""`greedy` against the float64 oracle, and the laws that it must obey."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from deltaguard.solvers import greedy

COMPENSATIONS = ("joint", "additive", "none")


@st.composite
def layers(draw, *, kinds=("full", "rank-one", "dead", "zero", "diagonal")):
    """(aligned, finetuned, hessian) in float64, small, of every awkward kind."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(kinds))
    inputs = random.normal(size=(1 if kind == "rank-one" else 3 * columns, columns))
    if kind == "dead":
        inputs[:, random.integers(columns)] = 0
        inputs[0, 0] += 1
    hessian = inputs.T @ inputs / len(inputs)
    if kind == "diagonal":  # equal diagonal entries: columns tie exactly
        hessian = np.diag(random.choice([0.5, 1.0, 2.0], size=columns))
    aligned = random.normal(size=(rows, columns))
    delta = np.zeros((rows, columns)) if kind == "zero" else random.normal(size=(rows, columns))
    return torch.tensor(aligned), torch.tensor(aligned + delta), torch.tensor(hessian)


strengths = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))


def damped_cost(solution, aligned, hessian):
    return oracle.safety_cost((solution.weight - aligned).numpy(), oracle.damp(hessian.numpy(), 0.01))


@given(layers(), strengths, st.sampled_from(COMPENSATIONS), st.sampled_from(["paper", "fraction"]))
def test_agrees_with_the_oracle_entry_by_entry(layer, strength, compensation, budget):
    aligned, finetuned, hessian = layer
    delta = (finetuned - aligned).numpy()
    mask = oracle.select(delta, hessian.numpy(), strength, budget, 0.01)
    restored = oracle.compensate(delta, mask, hessian.numpy(), compensation, 0.01)
    solution = greedy(
        aligned, finetuned, hessian, strength=strength, budget=budget, compensation=compensation
    )
    np.testing.assert_allclose(solution.weight - aligned, restored, rtol=1e-7, atol=1e-9)
    assert solution.kept_entries == pytest.approx(mask.mean())
    energy = (delta**2).sum()
    kept = (restored * delta).sum() / energy if energy else 0
    assert solution.kept_energy == pytest.approx(kept, rel=1e-6, abs=1e-9)
    before = oracle.safety_cost(delta, hessian.numpy())
    if before > 1e-9:
        after = oracle.safety_cost(restored, hessian.numpy())
        assert solution.safety_cost == pytest.approx(after / before, rel=1e-6, abs=1e-9)
        lost = ((restored - delta) ** 2).sum() / (delta**2).sum()
        assert solution.utility_loss == pytest.approx(lost, rel=1e-6, abs=1e-9)


@given(layers(kinds=("full", "dead", "rank-one")), st.floats(0, 1), st.sampled_from(COMPENSATIONS))
def test_half_precision_inputs_are_solved_in_single_precision(layer, strength, compensation):
    aligned, finetuned, hessian = (
        x.to(t) for x, t in zip(layer, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True)
    )
    exact = greedy(
        aligned.double(), finetuned.double(), hessian.double(), strength=strength, compensation=compensation
    )
    solution = greedy(aligned, finetuned, hessian, strength=strength, compensation=compensation)
    assert solution.weight.dtype == torch.float32
    if solution.kept_entries == exact.kept_entries:  # a budget that falls on an entry may go either way
        torch.testing.assert_close(solution.weight.double(), exact.weight, rtol=2e-3, atol=2e-3)
    assert abs(solution.kept_entries - exact.kept_entries) <= 1 / aligned.numel() + 1e-9


@given(layers(), st.sampled_from(COMPENSATIONS), st.sampled_from(["paper", "fraction"]))
def test_strength_0_gives_the_aligned_weight_exactly(layer, compensation, budget):
    aligned, finetuned, hessian = layer
    solution = greedy(aligned, finetuned, hessian, strength=0, compensation=compensation, budget=budget)
    assert torch.equal(solution.weight, aligned)


@given(layers(), st.sampled_from(COMPENSATIONS))
def test_fraction_1_gives_the_finetuned_weight_exactly(layer, compensation):
    aligned, finetuned, hessian = layer
    solution = greedy(aligned, finetuned, hessian, strength=1, compensation=compensation)
    assert torch.equal(solution.weight, finetuned)
    assert solution.kept_entries == 1
    assert solution.kept_energy == pytest.approx(float(not torch.equal(aligned, finetuned)))
    assert solution.utility_loss == 0


@given(layers(), st.floats(0, 1), st.floats(0, 1))
def test_safety_cost_grows_with_strength(layer, one, other):
    aligned, finetuned, hessian = layer
    weaker, stronger = (
        damped_cost(greedy(aligned, finetuned, hessian, strength=s), aligned, hessian)
        for s in sorted((one, other))
    )
    assert weaker <= stronger * (1 + 1e-9) + 1e-12


@given(layers(kinds=("full", "dead", "rank-one")), strengths, st.sampled_from(COMPENSATIONS), st.randoms())
def test_row_order_does_not_matter(layer, strength, compensation, random):
    aligned, finetuned, hessian = layer
    rows = list(range(len(aligned)))
    random.shuffle(rows)
    straight = greedy(aligned, finetuned, hessian, strength=strength, compensation=compensation)
    shuffled = greedy(aligned[rows], finetuned[rows], hessian, strength=strength, compensation=compensation)
    torch.testing.assert_close(shuffled.weight, straight.weight[rows], rtol=1e-9, atol=1e-9)


@given(layers(), st.floats(0, 1), st.sampled_from(["paper", "fraction"]))
def test_joint_compensation_leaves_no_gradient_on_unselected_entries(layer, strength, budget):
    aligned, finetuned, hessian = layer
    solution = greedy(aligned, finetuned, hessian, strength=strength, budget=budget)
    damped = torch.tensor(oracle.damp(hessian.numpy(), 0.01))
    gradient = (solution.weight - aligned) @ damped
    unselected = solution.weight != finetuned
    scale = ((finetuned - aligned) @ damped).abs().max() + 1e-12
    assert (gradient[unselected].abs() <= 1e-8 * scale).all()


@given(layers(), st.floats(0, 1), st.sampled_from(["paper", "fraction"]))
def test_joint_compensation_never_costs_more_at_the_same_mask(layer, strength, budget):
    aligned, finetuned, hessian = layer
    joint, additive, none = (
        damped_cost(
            greedy(aligned, finetuned, hessian, strength=strength, budget=budget, compensation=c),
            aligned,
            hessian,
        )
        for c in COMPENSATIONS
    )
    assert joint <= min(additive, none) * (1 + 1e-9) + 1e-12


@given(layers(), st.floats(0, 1))
def test_the_selection_stays_within_its_share_of_the_summed_cost(layer, strength):
    aligned, finetuned, hessian = layer
    solution = greedy(aligned, finetuned, hessian, strength=strength, compensation="none")
    h = np.diag(np.linalg.inv(oracle.damp(hessian.numpy(), 0.01)))
    delta = (finetuned - aligned).numpy()
    kept = (solution.weight - aligned).numpy()
    assert (kept**2 / (2 * h)).sum() <= strength * (delta**2 / (2 * h)).sum() * (1 + 1e-9)


def test_inputs_are_not_modified():
    torch.manual_seed(0)
    aligned, finetuned, hessian = torch.randn(4, 5), torch.randn(4, 5), torch.eye(5)
    copies = [t.clone() for t in (aligned, finetuned, hessian)]
    greedy(aligned, finetuned, hessian, strength=0.4)
    assert all(torch.equal(a, b) for a, b in zip((aligned, finetuned, hessian), copies, strict=True))


def test_a_wide_layer_crosses_column_blocks():
    """Several blocks of the triangular product, in float64, against the oracle."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(1500, 1100)) * random.uniform(0.1, 3, size=1100)
    hessian, delta = inputs.T @ inputs / 1500, random.normal(size=(2, 1100))
    aligned = torch.zeros(2, 1100, dtype=torch.float64)
    solution = greedy(aligned, torch.tensor(delta), torch.tensor(hessian), strength=0.3)
    mask = oracle.select(delta, hessian, 0.3, "fraction", 0.01)
    np.testing.assert_allclose(
        solution.weight, oracle.compensate(delta, mask, hessian, "joint", 0.01), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": 0.5, "budget": "papers"}, "budget is 'papers'"),
        ({"strength": 0.5, "compensation": "all"}, "compensation is 'all'"),
        ({"strength": 0.5, "dampening": 0.0}, "dampening is 0.0"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        greedy(torch.zeros(2, 2), torch.ones(2, 2), torch.eye(2), **change)


def test_bad_matrices_are_refused():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="same shape"):
        greedy(torch.zeros(2, 2), torch.ones(3, 2), eye, strength=0.5)
    with pytest.raises(ValueError, match="1 entries that are NaN"):
        greedy(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]]), eye, strength=0.5)
    with pytest.raises(ValueError, match="curvature is"):
        greedy(torch.zeros(2, 2), torch.ones(2, 2), torch.eye(3), strength=0.5)
    with pytest.raises(ValueError, match="curvature is zero"):
        greedy(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, 2), strength=0.5)
