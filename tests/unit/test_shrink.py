"""A gradient shrunk as the closed form shrinks a delta: against the matrix written out in float64."""

import pytest
import torch

from deltaguard.solvers import shrink, spectrum


def moment(size, seed):
    found = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.T @ found / (3 * size)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("mu", [0.0, 0.3, 40.0])
def test_it_solves_the_damped_system(mu, rank):
    inputs, outputs = spectrum(moment(4, 0), rank), spectrum(moment(3, 1), rank)
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = shrink(gradient, inputs, outputs, mu=mu)
    whole = torch.eye(12, dtype=torch.float64) + mu * torch.kron(outputs.dense(), inputs.dense())
    torch.testing.assert_close(found.flatten(), torch.linalg.solve(whole, gradient.flatten()))
    # It stays a direction of descent, whatever the curvature.
    assert float((found * gradient).sum()) > 0
