"""Which strengths a bench measures."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.studies.run import measured_strengths

LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def measured(ladder, probes, largest_safe):
    return [
        cell.strength
        for cell in measured_strengths(
            ladder,
            probes,
            is_safe=lambda cells: cells[0].strength <= largest_safe,
            cells_at=lambda strength: [SimpleNamespace(strength=strength)],
        )
    ]


def test_without_a_limit_every_rung_is_measured_in_order():
    assert measured(LADDER, None, 0.3) == list(LADDER)


@given(st.integers(0, 7))
def test_three_probes_find_the_largest_safe_rung_of_seven(safe_rungs):
    largest = LADDER[safe_rungs - 1] if safe_rungs else 0.0
    found = measured(LADDER, 3, largest)
    assert len(found) == 3
    assert max((s for s in found if s <= largest), default=0.0) == largest


@pytest.mark.parametrize(("largest", "expected"), [(0.0, [0.4, 0.2]), (0.4, [0.4, 0.6]), (0.7, [0.4, 0.6])])
def test_two_probes_of_seven_see_the_middle_and_one_side(largest, expected):
    assert measured(LADDER, 2, largest) == expected


@given(st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_all_seeds_are_measured_at_the_same_strengths_and_judged_together(safe_rungs):
    mean = sum(safe_rungs) / len(safe_rungs)
    found = [
        (cell.strength, cell.seed)
        for cell in measured_strengths(
            LADDER,
            3,
            is_safe=lambda cells: LADDER.index(cells[0].strength) + 1 <= mean,
            cells_at=lambda strength: [SimpleNamespace(strength=strength, seed=s) for s in safe_rungs],
        )
    ]
    assert [seed for _, seed in found] == safe_rungs * 3
    assert max((s for s, _ in found if LADDER.index(s) + 1 <= mean), default=0.0) == max(
        (s for i, s in enumerate(LADDER, 1) if i <= mean), default=0.0
    )


def test_one_rung_is_measured_once_whatever_the_number_of_probes():
    assert measured((0.8,), 5, 1.0) == [0.8]
