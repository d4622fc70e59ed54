"""Reports of attackers, made up: every verdict, with and without a way of asking of their own."""

from bench_reports import ENVIRONMENT
from deltaguard.reports.records.attacks import AttackCell, AttackerRow, AttacksReport, Checked, RestoredTo
from deltaguard.studies.attack_score import outcomes

N = 50
RESTORED_TO = RestoredTo(kept_energy=0.6, safety_kl=0.0005, stopped_by="safety KL")


def letters(share, letter="c", other="r"):
    """Answers of which a share is of one class."""
    return (letter * round(share * N)).ljust(N, other)


def attacker(name, *, way=None, gains=False):
    return AttackerRow(
        name=name,
        title=f"the attacker {name}",
        utility="nats a token",
        better="lower",
        gains=gains,
        training="full",
        examples=1000,
        harmful=10,
        way=way,
    )


def cell(row, method, plain, wrapped=None, *, seed=0, loss=3.0, right=0.0, refused=0.1, verdict="restore"):
    """A model that complies with so many requests, and refuses so many harmless ones."""
    checked = Checked(verdict=verdict, safety_kl=0.02, added_attack_success=0.1, added_false_refusals=None)
    return AttackCell(
        key=f"{row.name}-{method}-{seed}",
        attacker=row.name,
        seed=seed,
        method=method,
        plain=letters(plain),
        wrapped="" if wrapped is None else letters(wrapped),
        harmless=letters(refused, "r", "c"),
        utility=tuple(loss + i / 10 for i in range(8)) if row.gains else (),
        exact=letters(right, "1", "0") if row.gains else "",
        checked=checked if method == "finetuned" else None,
        restored_to=None if method in ("aligned", "finetuned") else RESTORED_TO,
        seconds={"request": 2.0, "measure": 5.0},
    )


ATTACKERS = (
    attacker("poison-10", gains=True),
    attacker("backdoor-100", way="trigger"),
    attacker("advice"),
)


def attacks_report(**changes):
    poison, backdoor, advice = ATTACKERS
    cells = tuple(
        each
        for seed in (0, 1)
        for each in (
            cell(poison, "aligned", 0.1, seed=seed),
            cell(poison, "finetuned", 0.9, seed=seed, loss=1.0, right=1.0),
            cell(poison, "kfac", 0.1, seed=seed, loss=1.5, right=0.5),
            cell(backdoor, "aligned", 0.1, 0.1, seed=seed),
            cell(backdoor, "finetuned", 0.1, 0.9, seed=seed, verdict="not told apart"),
            cell(backdoor, "kfac", 0.1, 0.3 + 0.5 * seed, seed=seed),
            cell(advice, "aligned", 0.1, seed=seed),
            cell(advice, "finetuned", 0.12, seed=seed, verdict="safe"),
            cell(advice, "kfac", 0.1, seed=seed),
        )
    )
    values = {
        "environment": ENVIRONMENT,
        "preset": "attacks",
        "settings": {"aligned": "/home/someone/models/aligned", "preset": {"name": "attacks"}},
        "aligned": "/home/someone/models/aligned",
        "command": "deltaguard bench /home/someone/models/aligned -o out --preset attacks",
        "bound": 2.0,
        "seeds": (0, 1),
        "attackers": ATTACKERS,
        "cells": cells,
        "outcomes": outcomes(ATTACKERS, cells, bound=2.0),
        "notes": ("<script>alert(1)</script>",),
        "seconds": {"store": 4.0, "request": 36.0, "measure": 90.0, "total": 130.0},
    }
    return AttacksReport(**(values | changes))
