"""Solvers: pure functions from one layer's matrices to a `Solution`. They import torch only."""

from deltaguard.solvers.baselines import interpolate
from deltaguard.solvers.factor import Factor, factorise
from deltaguard.solvers.greedy import greedy, greedy_factored
from deltaguard.solvers.published import published
from deltaguard.solvers.solution import Solution

__all__ = ["Factor", "Solution", "factorise", "greedy", "greedy_factored", "interpolate", "published"]
