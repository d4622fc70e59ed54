"""Laws of curvature that is cut off, and of the search for one μ."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.curvature.sums import RunningMoment, normalise
from deltaguard.solvers import (
    closed_form,
    joint_profile,
    kfac,
    profile,
    project,
    ridge,
    scaled_identity,
    spectrum,
)
from deltaguard.solvers.profile import PROHIBITIVE
from deltaguard.solvers.spectrum import _exact, _randomised, _tail_from_determinant


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed, size, decay=2.0):
    x = normal(seed, size, 3 * size) * torch.logspace(decay, -decay, size, dtype=torch.float64)[:, None]
    return x @ x.T / (3 * size)


SIZES = st.integers(1, 8)
SEEDS = st.integers(0, 10**6)
MU = st.floats(1e-6, 1e4)


@given(SEEDS, SIZES, SIZES, st.floats(0, 1), st.floats(0, 1), MU)
def test_a_cut_off_spectrum_solves_for_the_matrix_it_stands_for(seed, rows, columns, of_g, of_h, mu):
    aligned, finetuned = normal(seed, rows, columns), normal(seed + 1, rows, columns)
    inputs = spectrum(moment(seed + 2, columns), round(of_h * columns))
    outputs = spectrum(moment(seed + 3, rows), round(of_g * rows))
    found = closed_form(aligned, finetuned, inputs, outputs, mu=mu)
    expected = kfac(aligned, finetuned, inputs.dense(), outputs.dense(), mu=mu)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-8)
    for name in ("kept_energy", "safety_cost", "utility_loss"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), name


@given(SEEDS, SIZES, SIZES, st.integers(0, 8), MU)
def test_the_numbers_of_a_cut_off_solution_are_those_of_its_weight(seed, rows, columns, rank, mu):
    aligned, finetuned = normal(seed, rows, columns), normal(seed + 1, rows, columns)
    inputs = spectrum(moment(seed + 2, columns), min(rank, columns))
    outputs = spectrum(moment(seed + 3, rows), min(rank, rows))
    found = closed_form(aligned, finetuned, inputs, outputs, mu=mu)
    delta, kept = finetuned - aligned, found.weight - aligned
    H, G = inputs.dense(), outputs.dense()
    cost = float(torch.trace(kept @ H @ kept.T) / torch.trace(delta @ H @ delta.T))
    assert found.safety_cost == pytest.approx(cost, rel=1e-6, abs=1e-9)
    # Prices within a bin stand at their mean.
    predicted = 0.5 * float(torch.trace(G @ kept @ H @ kept.T))
    assert found.detail["predicted_safety_kl"] == pytest.approx(predicted, rel=2e-3, abs=1e-12)
    lost = float((kept - delta).square().sum() / delta.square().sum())
    assert found.utility_loss == pytest.approx(lost, rel=2e-3, abs=1e-9)


@given(SEEDS, SIZES, SIZES, MU, st.floats(0.1, 10))
def test_ridge_is_the_closed_form_with_a_multiple_of_the_identity(seed, rows, columns, mu, scale):
    aligned, finetuned, H = (
        normal(seed, rows, columns),
        normal(seed + 1, rows, columns),
        moment(seed, columns),
    )
    inputs = spectrum(H)
    found = closed_form(aligned, finetuned, inputs, scaled_identity(rows, scale, like=inputs.values), mu=mu)
    torch.testing.assert_close(found.weight, ridge(aligned, finetuned, H, mu=mu * scale).weight)


@given(SEEDS, SIZES)
def test_the_tail_is_the_geometric_mean_of_what_is_cut_off(seed, size):
    values = normal(seed, size).square() + 0.1
    basis, _ = torch.linalg.qr(normal(seed + 1, size, size))
    found = spectrum(basis @ torch.diag(values) @ basis.T, size // 2)
    others = values.sort(descending=True).values[size // 2 :]
    floored = others + others.mean() / 100
    assert found.tail == pytest.approx(float(floored.log().mean().exp()), rel=1e-6)
    assert spectrum(torch.diag(values)).tail == 0


def test_directions_that_no_token_reached_are_not_free():
    found = spectrum(torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0])), 1)
    assert found.tail == pytest.approx((1.0033 * 0.0033**2) ** (1 / 3), rel=0.05)


# Directions of which nothing is known


def unreached(seed, size, reached):
    """A second moment of tokens that lie in the first `reached` coordinates, turned."""
    values = torch.zeros(size, dtype=torch.float64)
    values[:reached] = normal(seed, reached).square().sort(descending=True).values + 0.01
    basis, _ = torch.linalg.qr(normal(seed + 1, size, size))
    return (basis * values) @ basis.T


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1])
@pytest.mark.parametrize("reached", [2, 8, 20, 30, 40])
def test_no_direction_is_free_however_much_is_kept(reached, share):
    matrix = unreached(reached, 40, reached)
    for found in (spectrum(matrix, round(share * 40)), spectrum(matrix.float(), round(share * 40))):
        priced = found.floored()
        assert float(torch.linalg.eigvalsh(priced.dense().double())[0]) > 0
        assert torch.equal(priced.vectors, found.vectors)


def test_eigenvalues_are_raised_to_a_hundredth_of_the_mean_of_the_smaller_three_quarters():
    whole = spectrum(torch.diag(torch.tensor([8.0, 4.0, 2.0, 0.0])))
    assert whole.floored().values.tolist() == pytest.approx([8, 4, 2, 0.02])
    # The tail stands for as many eigenvalues as are not kept.
    cut = spectrum(torch.diag(torch.tensor([8.0, 4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])), 3)
    assert cut.tail == 0
    assert cut.floored().values.tolist() == [8, 4, 2]
    assert cut.floored().tail == pytest.approx(0.01 * 2 / 6)
    # Where nothing is left beyond the first quarter, it is what rounding of the largest hides.
    few = spectrum(torch.diag(torch.tensor([8.0, 0.0, 0.0, 0.0])))
    assert few.floored().values.tolist() == pytest.approx([8, *[8 * torch.finfo(torch.float32).eps] * 3])


@given(SEEDS, st.integers(4, 24), st.floats(0.02, 0.25))
def test_what_keeps_a_quarter_or_less_stays_as_it_is(seed, size, share):
    found = spectrum(moment(seed, size), max(1, int(share * size)))
    priced = found.floored()
    assert priced.tail == found.tail
    assert torch.equal(priced.values, found.values)


@pytest.mark.parametrize("reached", [60, 44, 15, 4])
def test_results_move_continuously_to_those_of_the_whole(reached):
    """As the share goes to 1: no step at the end, whatever the number of directions that tokens reach."""
    size = 60
    H, G = unreached(reached, size, reached), unreached(reached + 9, size, reached)
    aligned, finetuned = normal(1, size, size), normal(2, size, size)

    def solved(rank):
        spectra = (spectrum(matrix, rank).floored() for matrix in (H, G))
        return closed_form(aligned, finetuned, *spectra, mu=1e3).weight

    whole, delta = solved(size), float((finetuned - aligned).norm())
    steps = [float((solved(size - cut) - whole).norm()) / delta for cut in (8, 4, 2, 1)]
    assert steps[-1] < 1e-3
    assert steps == sorted(steps, reverse=True) or max(steps) < 1e-3


def test_a_prohibitive_price_leaves_nothing_even_of_what_costs_nothing():
    found = project(torch.ones(2, 2), spectrum(torch.zeros(2, 2)), spectrum(torch.eye(2)))
    assert not found.restored(PROHIBITIVE).any()
    assert found.directions.profile().kept(PROHIBITIVE) == 0
    assert found.directions.safety_cost(PROHIBITIVE) == 0


def test_where_rounding_makes_a_matrix_indefinite_the_tail_is_that_of_all_eigenvalues():
    matrix = moment(1, 80, decay=4.0).float()
    # By more than a hundredth of the mean, by which eigenvalues are raised.
    matrix.diagonal().sub_(0.05 * float(torch.linalg.eigvalsh(matrix)[:75].mean()))
    values = torch.linalg.eigvalsh(matrix.double())
    assert values[0] < 0
    found = _tail_from_determinant(matrix, torch.linalg.eigvalsh(matrix).flip(0)[:5])
    assert found == pytest.approx(_exact(matrix.double(), 5).tail)
    assert found < float(values[:75].clamp_min(0).mean())


def massive(seed, size=256):
    """Sums over tokens of which some hundred are thousands of times as long as others, in two coordinates."""
    scale = torch.logspace(0, -1.5, size) / 5
    scale[:2] = 0.02
    tokens = torch.randn(4096, size, generator=torch.Generator().manual_seed(seed)) * scale
    tokens[:128] = 0
    tokens[:128, :2] = torch.linspace(0.9, 1.1, 128)[:, None] * torch.tensor([3400.0, 1240.0])
    running = RunningMoment(size)
    for part in tokens.split(256):
        running.add(part)
    precise = tokens.double()
    return normalise(running.taken()), precise.T @ precise / len(precise)


@pytest.mark.parametrize("seed", range(4))
def test_the_tail_beside_a_massive_activation_is_no_larger_than_the_mean(seed):
    rounded, precise = massive(seed)
    expected = _exact(precise, 16)
    mean = float(precise.trace() - expected.values.sum()) / 240
    for found in (_randomised(rounded, 16), _exact(rounded, 16)):
        assert 0.5 * expected.tail < found.tail < 1.05 * mean


def test_the_randomised_spectrum_is_the_exact_one_and_repeats():
    matrix = moment(0, 300, decay=3.0)
    exact, drawn = _exact(matrix, 40), _randomised(matrix, 40)
    torch.testing.assert_close(drawn.values, exact.values, rtol=1e-4, atol=0)
    assert drawn.tail == pytest.approx(exact.tail, rel=1e-4)
    torch.testing.assert_close(drawn.dense(), exact.dense(), rtol=0, atol=1e-4 * float(exact.values[0]))
    before = torch.random.get_rng_state()
    assert torch.equal(_randomised(matrix, 40).vectors, drawn.vectors)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_eigenpairs_the_geometric_mean_is_that_of_all():
    matrix = moment(0, 300, decay=3.0)
    assert _randomised(matrix, 0).tail == pytest.approx(_exact(matrix, 0).tail, rel=1e-4)
    assert len(_randomised(matrix, 0).values) == 0


def test_what_few_tokens_reach_has_no_negative_eigenvalue():
    x = normal(3, 300, 20).float()
    drawn = _randomised(x @ x.T, 60)
    assert float(drawn.values.min()) >= 0
    torch.testing.assert_close(drawn.values[:20], _exact(x @ x.T, 20).values)


@pytest.mark.parametrize("decay", [1.0, 1.3, 2.5])
def test_the_randomised_spectrum_holds_nearly_as_much_as_the_exact_one(decay):
    values = torch.arange(1, 401, dtype=torch.float64) ** -decay
    basis = torch.linalg.qr(normal(0, 400, 400)).Q
    drawn = _randomised((basis * values) @ basis.T, 90)
    assert bool((drawn.values <= values[:90] * (1 + 1e-9)).all())
    assert float(drawn.values.sum()) > 0.985 * float(values[:90].sum())
    torch.testing.assert_close(drawn.vectors.T @ drawn.vectors, torch.eye(90, dtype=torch.float64))


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"rank is 4; it must lie in \[0, 3\]"):
        spectrum(torch.eye(3), 4)


@given(SEEDS, SIZES, SIZES, st.floats(1e-4, 1))
def test_the_price_of_a_share_gives_that_share(seed, rows, columns, strength):
    layers = [
        project(
            normal(seed + i, rows, columns), spectrum(moment(seed + i, columns)), spectrum(moment(seed, rows))
        )
        for i in range(2)
    ]
    joint = joint_profile(layer.directions.profile() for layer in layers)
    mu = joint.mu_of_share(strength)
    spent = sum(layer.directions.profile().predicted_kl(mu) for layer in layers)
    whole = sum(layer.directions.profile().predicted_kl(0) for layer in layers)
    assert spent == pytest.approx(strength * whole, rel=5e-3)
    assert joint.energy == pytest.approx(sum(float(layer.delta.square().sum()) for layer in layers))


def test_the_ends_of_the_price_and_shares_outside():
    found = profile(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert (found.mu_of_share(0), found.mu_of_share(1)) == (PROHIBITIVE, 0.0)
    assert found.predicted_kl(math.inf) == 0
    free = profile(torch.tensor([0.0]), torch.tensor([1.0]))
    assert (free.mu_of_share(0), free.mu_of_share(0.5)) == (PROHIBITIVE, 0.0)
    with pytest.raises(ValueError, match=r"strength is 1.5; it must lie in \[0, 1\]"):
        found.mu_of_share(1.5)
