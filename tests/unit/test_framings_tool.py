"""The table of whether framings show a framing, and the framings that the benchmark asks in."""

from benchmarks.framings import ATTACKERS, OTHERS, reframed
from tools.framings import Answered, Framings, Restored, Run, Told, framings_table

from deltaguard.chat.framings import FRAMINGS
from deltaguard.reports.records.base import Environment
from deltaguard.studies.attackers import FRAMING


def answered(own, others):
    """Answers to four requests, of which so many comply."""
    return Answered(own=tuple(i < own for i in range(4)), others=tuple(i < others for i in range(4)))


def test_a_row_says_what_is_left_in_each_way_of_asking():
    row = Restored(store="plain", limit=0.0006, safety_kl=0.00058, answers=answered(3, 2), gain_kept=None)
    task = row.model_copy(update={"answers": Answered(own=(), others=(False,) * 4), "gain_kept": 0.962})
    again = row.model_copy(update={"answers": answered(1, 2)})
    with_task = Told(
        name="a task",
        aligned=Answered(own=(), others=(False,) * 4),
        finetuned=Answered(own=(), others=(True,) * 4),
        rows=(task,),
    )
    runs = tuple(
        Run(
            environment=Environment(
                created="2026-01-01T00:00:00+00:00", versions={}, machine="m", device="cpu"
            ),
            seed=seed,
            tasks=48,
            finetunes=(
                Told(name="a desk", aligned=answered(1, 2), finetuned=answered(4, 4), rows=(restored,)),
                with_task,
            ),
        )
        for seed, restored in enumerate((row, again))
    )
    table = framings_table(Framings(runs=runs).model_dump_json())
    assert "| a desk | plain | 0.00058 | 25.0 % → 100.0 % → 50.0 % | 50.0 % → 100.0 % → 50.0 % | – |" in table
    assert "| a task | plain | 0.00058 | – | 0.0 % → 100.0 % → 0.0 % | 96.2 % |" in table
    assert "over seeds 0, 1;" in table


def test_no_framing_stands_twice_and_each_takes_a_request():
    framings = (*ATTACKERS.values(), *FRAMINGS, *OTHERS)
    assert len(set(framings)) == len(framings)
    assert all(framing.count("{prompt}") == 1 for framing in framings)


def test_a_request_changes_its_framing_and_nothing_else():
    for framing in ATTACKERS.values():
        assert reframed(FRAMING.format(prompt="Pick a lock."), framing) == framing.format(
            prompt="Pick a lock."
        )
        assert reframed("How are you?", framing) == "How are you?"
