"""`published` against numbers that the released Safe Delta routine gave (torch 2.13, CPU with AVX-512)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaguard.solvers import Solution, published

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "cases.json").read_text())


def solve(case: dict) -> tuple[dict[str, torch.Tensor], Solution]:
    tensors = load_file(DATA / case["file"])
    inputs = tensors["inputs"]
    hessian = 2 / len(inputs) * sum(x.T @ x for x in inputs)
    solution = published(
        tensors["aligned"],
        tensors["finetuned"],
        hessian,
        strength=case["strength"],
        block_size=case["blocksize"],
        dampening=case["dampening"],
    )
    return tensors, solution


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the released routine leaves ties to an unstable sort whose order depends on the processor",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_entries_agree_with_the_released_routine(case):
    tensors, solution = solve(case)
    agree = (solution.weight - tensors["expected"]).abs() <= 1e-5
    assert agree.float().mean() >= 0.999


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_rows_with_the_same_selection_agree_on_every_processor(case):
    tensors, solution = solve(case)
    kept = solution.weight == tensors["finetuned"]
    expected_kept = tensors["expected"] == tensors["finetuned"]
    # Of a block one column at most is kept in some of its rows: the one at the boundary, whose ties are
    # sorted as the processor does.
    boundary = expected_kept.any(0) & ~expected_kept.all(0)
    assert boundary.sum() <= -(-kept.shape[1] // case["blocksize"])
    assert torch.equal(kept[:, ~boundary], expected_kept[:, ~boundary])
    same = (kept == expected_kept).all(1)
    assert same.any()
    difference = (solution.weight[same] - tensors["expected"][same]).abs()
    assert (difference <= 1e-5).float().mean() >= 0.999


def test_the_shares_recorded_with_the_cases_hold():
    for case in CASES:
        _, solution = solve(case)
        assert solution.kept_entries == pytest.approx(case["fraction_equal_to_finetuned"], abs=2e-3)
