"""Solvers: pure functions from one layer's matrices to a `Solution`. They import torch only."""

from deltaguard.solvers.baselines import (
    interpolate,
    resta,
    safe_lora,
    safe_merge,
)
from deltaguard.solvers.closed_form import (
    closed_form,
    kfac,
    outcome_of,
    outcome_of_factors,
    ridge,
    solve_projected,
)
from deltaguard.solvers.factor import Factor, factorise
from deltaguard.solvers.greedy import greedy, greedy_factored
from deltaguard.solvers.low_rank import LowRank, low_rank, low_rank_of_factors
from deltaguard.solvers.profile import Directions, Profile, joint_profile, profile
from deltaguard.solvers.projection import Projection, project, project_product, shrink
from deltaguard.solvers.published import published
from deltaguard.solvers.solution import Difference, Outcome, Solution
from deltaguard.solvers.spectrum import Spectrum, scaled_identity, spectrum
from deltaguard.solvers.thin import ThinProjection, project_thin

__all__ = [
    "Difference",
    "Directions",
    "Factor",
    "LowRank",
    "Outcome",
    "Profile",
    "Projection",
    "Solution",
    "Spectrum",
    "ThinProjection",
    "closed_form",
    "factorise",
    "greedy",
    "greedy_factored",
    "interpolate",
    "joint_profile",
    "kfac",
    "low_rank",
    "low_rank_of_factors",
    "outcome_of",
    "outcome_of_factors",
    "profile",
    "project",
    "project_product",
    "project_thin",
    "published",
    "resta",
    "ridge",
    "safe_lora",
    "safe_merge",
    "scaled_identity",
    "shrink",
    "solve_projected",
    "spectrum",
]
