"""The table of where refusing is decided: what is lost at a limit, between strengths that were measured."""

import pytest
from tools.positions import (
    NATS,
    Candidate,
    Positions,
    PositionsRuns,
    kept_at_limit,
    kept_at_nats,
    positions_table,
)

from deltaguard.reports.records.base import Environment
from deltaguard.reports.text import DASH

HUNDRED = 200


def complied(points):
    """Answers of which so many of a hundred comply, among the even requests as among the odd ones."""
    return tuple(i // 2 < 20 + points for i in range(HUNDRED))


def found(*curve, name="all"):
    rows = tuple(
        Candidate(
            seed=seed, curvature=name, strength=s, safety_kl=s, gain_kept=1 - lost, complied=complied(points)
        )
        for seed in (0, 1)
        for s, (points, lost) in enumerate(curve, start=1)
    )
    made = Environment(created="2026-01-01T00:00:00+00:00", versions={}, machine="m", device="cpu")
    return Positions(
        environment=made,
        command="python -m benchmarks.positions aligned",
        finetune="A task",
        aligned=complied(0),
        finetuned={0: complied(70), 1: complied(70)},
        tasks=4,
        rows=rows,
    )


@pytest.mark.parametrize(
    ("curve", "kept"),
    [
        ([(0, 0.1), (1, 0.05), (2, 0.03)], "≥ 97.0 %"),  # the loosest one is within the limit
        ([(0, 0.16), (4, 0.01)], "96.0 %"),  # halfway in points is halfway in the logarithm
        ([(2, 0.16), (4, 0.01)], "84.0 %"),
        ([(3, 0.1), (4, 0.05)], "over at every strength"),
    ],
)
def test_the_gain_at_the_limit_lies_between_those_measured(curve, kept):
    known = found(*curve)
    assert kept_at_limit(known, known.rows, 0) == kept
    assert kept_at_limit(known, known.rows, 1) == kept


@pytest.mark.parametrize(
    ("nats", "kept"), [((0.5, 2), "96.0 %"), ((1, 2), "84.0 %"), ((1.1, 2), DASH), ((0.5, 0.9), DASH)]
)
def test_the_gain_at_the_default_limit_of_safety_kl_lies_between_too(nats, kept):
    rows = found((0, 0.16), (4, 0.01)).rows
    changed = [row.model_copy(update={"safety_kl": NATS * nats[int(row.strength) - 1]}) for row in rows]
    assert kept_at_nats(changed) == kept


def drawn(*runs):
    return positions_table(PositionsRuns(runs=runs).model_dump_json())


def test_a_row_says_what_was_chosen_on_and_what_was_not():
    table = drawn(found((0, 0.16), (4, 0.01)))
    assert "| all | 96.0 % | 96.0 % | – | 84.0 % (+0.0; 1) | 99.0 % (+4.0; 2) |" in table
    assert "over at every strength" in drawn(found((3, 0.1)))


def test_with_the_choosing_seed_alone_nothing_is_reported():
    both = found((0, 0.16), (4, 0.01))
    first = tuple(row for row in both.rows if row.seed == 0)
    one = both.model_copy(update={"finetuned": {0: both.finetuned[0]}, "rows": first})
    assert "| all | 96.0 % | – | – | – | – |" in drawn(one)
    with pytest.raises(ValueError, match="not all the same seeds"):
        PositionsRuns(runs=(one, both))


def test_several_fine_tunes_stand_in_one_table_and_what_teaches_nothing_has_points_alone():
    task = found((0, 0.16), (4, 0.01))
    nothing = [row.model_copy(update={"gain_kept": None}) for row in task.rows]
    table = drawn(task, task.model_copy(update={"finetune": "Harm", "rows": tuple(nothing), "tasks": 0}))
    assert "| A task | all | 96.0 % | 96.0 % | – | 84.0 % (+0.0; 1) | 99.0 % (+4.0; 2) |" in table
    assert "| Harm | all | – | – | – | – (+0.0; 1) | – (+4.0; 2) |" in table
    assert table.count("python -m benchmarks.positions aligned") == 1
