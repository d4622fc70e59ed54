"""A restored delta orthogonal to a matrix is the nearest such one, whichever way the delta is held."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.methods import METHODS
from deltaguard.methods.method import Curvature, Layer
from deltaguard.solvers import LowRank, closed_form, outcome_of, project, project_product, spectrum
from deltaguard.solvers.profile import PROHIBITIVE

MU = st.floats(1e-3, 1e3)


def layer(seed, out=7, features=5, rank=2):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, outputs = random(20, features), random(20, out)
    spectra = spectrum(inputs.T @ inputs / 20, 3), spectrum(outputs.T @ outputs / 20, 4)
    return (
        random(out, rank),
        random(rank, features),
        *spectra,
        LowRank(random(2, features), random(out, 2), 0.0),
    )


def levelled(delta, matrix):
    """What the definition says."""
    unit = matrix.up @ matrix.down
    unit = unit / unit.norm()
    return delta - (unit * delta).sum() * unit


@given(st.integers(0, 10**6), MU)
def test_it_is_the_closed_form_less_its_part_along_the_matrix(seed, mu):
    up, down, inputs, outputs, matrix = layer(seed)
    delta = up @ down
    plain = closed_form(torch.zeros_like(delta), delta, inputs, outputs, mu=mu).weight
    expected = levelled(plain, matrix)
    whole = project(delta, inputs, outputs, matrix)
    assert torch.allclose(whole.restored(mu), expected, atol=1e-10)
    thin = project_product(up, down, inputs, outputs, matrix)
    assert torch.allclose(thin.restored(mu), expected, atol=1e-5)
    assert abs(float((expected * (matrix.up @ matrix.down)).sum())) < 1e-9


@given(st.integers(0, 10**6), MU)
def test_what_is_said_of_it_is_so(seed, mu):
    up, down, inputs, outputs, matrix = layer(seed)
    delta, h, g = up @ down, inputs.dense(), outputs.dense()
    for found in (
        project(delta, inputs, outputs, matrix),
        project_product(up, down, inputs, outputs, matrix),
    ):
        left, said = found.restored(mu), outcome_of(found, mu)
        energy = float(delta.square().sum())
        assert said.kept_energy == pytest.approx(float((left * delta).sum()) / energy, rel=1e-3, abs=1e-3)
        assert said.utility_loss == pytest.approx(
            float((left - delta).square().sum()) / energy, rel=1e-3, abs=1e-3
        )
        predicted = 0.5 * float(((g @ left @ h) * left).sum())
        assert said.detail["predicted_safety_kl"] == pytest.approx(predicted, rel=1e-2, abs=1e-3)
        cost = float(((left @ h) * left).sum()) / float(((delta @ h) * delta).sum())
        assert said.safety_cost == pytest.approx(cost, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("is_thin", [True, False])
def test_an_adapter_of_any_rank_above_1_is_orthogonal_to_it_too(is_thin, rank):
    up, down, inputs, outputs, matrix = layer(0, out=80, features=60, rank=2 if is_thin else 6)
    # Of a rank above, the product has no factors to keep, and the whole is cut.
    assert not is_thin or project_product(up, down, inputs, outputs, matrix).factors(0.5) is not None
    delta = up @ down
    weights = torch.zeros_like(delta), delta
    curvature = Curvature(inputs=inputs, outputs=outputs, leaning=matrix)
    given = Layer(*weights, product=(up, down) if is_thin else None, curvature=curvature)
    found, _ = METHODS["kfac"].prepare(given, METHODS["kfac"].options()).factors_at(0.5, rank)
    assert rank is None or len(found.down) == rank
    left, unit = found.up @ found.down, matrix.up @ matrix.down
    along = abs(float((left * unit).sum() / (left.norm() * unit.norm())))
    assert (along < 1e-6) == (rank != 1)


def test_the_ends_of_the_range_are_the_two_models():
    up, down, inputs, outputs, matrix = layer(0)
    for found in (
        project(up @ down, inputs, outputs, matrix),
        project_product(up, down, inputs, outputs, matrix),
    ):
        assert not found.restored(PROHIBITIVE).any()
        assert torch.allclose(found.restored(0.0), up @ down)
        assert outcome_of(found, 0.0).kept_energy == 1


def test_a_matrix_of_zero_is_no_condition():
    up, down, inputs, outputs, matrix = layer(1)
    nothing = LowRank(matrix.down, torch.zeros_like(matrix.up), 0.0)
    assert project(up @ down, inputs, outputs, nothing).level is None
