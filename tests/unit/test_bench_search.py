"""Which strengths a bench measures."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.bench.search import measured_strengths

LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def measured(ladder, probes, largest_safe):
    return [
        cell.strength
        for cell in measured_strengths(
            ladder,
            probes,
            is_safe=lambda cell: cell.strength <= largest_safe,
            cell_at=lambda strength: SimpleNamespace(strength=strength),
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


@pytest.mark.parametrize(("largest", "expected"), [(0.0, [0.2, 0.1]), (0.2, [0.2, 0.3]), (0.3, [0.2, 0.3])])
def test_two_probes_of_three(largest, expected):
    assert measured(LADDER[:3], 2, largest) == expected


def test_one_rung_is_measured_once_whatever_the_number_of_probes():
    assert measured((0.8,), 5, 1.0) == [0.8]
