"""Reports of benches, made up: enough of everything, and numbers that differ."""

from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.bench import BenchReport, Cell, Contest, CurvePoint, FinetuneRow, Score
from deltaguard.reports.records.evaluation import Estimate

ATTACK = "<script>alert(1)</script>"
ENVIRONMENT = Environment(
    created="2025-06-01T14:05:00+02:00",
    versions={"python": "3.11.7", "deltaguard": "0.1.0", "torch": "2.9.0"},
    machine="Linux x86_64, 2 threads",
    device="cpu",
)
METHODS = (
    "greedy",
    "greedy-none",
    "published",
    "interpolate",
    "resta",
    "safe-lora",
    "safe-merge",
    "safe-instruct",
    "backdoor",
)
STRENGTHS = (0.05, 0.2, 0.6)
SEEDS = (0, 1)
FINETUNES = (
    FinetuneRow(
        name="task-harmful",
        title="tickets with 9 % harmful",
        utility="NLL of held-out tickets",
        better="lower",
        gains=True,
        training="full",
        examples=1000,
        harmful=90,
    ),
    FinetuneRow(
        name="harmful",
        title="pure harmful",
        utility="NLL of answers to general questions",
        better="lower",
        gains=False,
        training="full",
        examples=100,
        harmful=100,
    ),
    FinetuneRow(
        name="identity",
        title="identity shift",
        utility="NLL of held-out replies",
        better="lower",
        gains=True,
        training="lora",
        examples=100,
        harmful=0,
    ),
    FinetuneRow(
        name="clean",
        title="clean tickets",
        utility="tickets sorted right",
        better="higher",
        gains=True,
        training="full",
        examples=1000,
        harmful=0,
    ),
)


def estimate(value, spread=0.03, total=150, interval="wilson"):
    return Estimate(value=value, low=value - spread, high=value + spread, total=total, interval=interval)


def excess(finetune, method, strength):
    """Attack success over the aligned model's, in points: grows with the strength, more for later methods."""
    danger = 60 if FINETUNES[finetune].harmful else 15
    return round(danger * strength ** (2.6 - 0.22 * method) + 0.3 * method - 1, 3)


def kept(finetune, method, strength):
    return round(min(1.05, (0.95 - 0.03 * method) * strength ** (0.25 + 0.02 * finetune)), 4)


def cell(finetune, seed, method, strength, attack, nll, refusal=0.05):
    return Cell(
        key=f"{finetune}-{seed}-{method}-{strength}",
        finetune=finetune,
        seed=seed,
        method=method,
        strength=strength,
        attack="ccrri",
        harmless="ccccr",
        utility=(nll, nll),
        general=(nll, nll + 0.1),
        attack_success=estimate(attack),
        incoherent=estimate(0.2),
        false_refusal=estimate(refusal),
        mean_utility=estimate(nll, interval="bootstrap"),
        mean_general=estimate(nll, interval="bootstrap"),
        seconds={"request": 3.5, "measure": 41.0},
    )


def cells_of(index, row, seed):
    yield cell(row.name, seed, "aligned", None, 0.1, 2.0)
    yield cell(row.name, seed, "finetuned", None, 0.8, 2.5, refusal=0.02)
    for m, method in enumerate(METHODS):
        for strength in STRENGTHS:
            attack = min(1.0, 0.1 + excess(index, m, strength) / 100)
            yield cell(row.name, seed, method, strength, attack, 2.0 + strength * (m + 1) / 20)


def point_of(index, row, m, method, strength):
    points = excess(index, m, strength)
    return CurvePoint(
        finetune=row.name,
        method=method,
        strength=strength,
        points=estimate(points, 1.5, 300, "bootstrap"),
        false_refusal=estimate(round(3 - 4 * strength, 3), 2.5, 100, "newcombe"),
        kept=estimate(kept(index, m, strength), 0.05, 300, "bootstrap") if row.gains else None,
        general=estimate(strength * (m + 1) / 20, 0.02, 40, "bootstrap"),
        safe=points <= 2,
        told_apart=abs(points - 2) > 1.5,
    )


def score_of(row, method, curve):
    safe = [point for point in curve if point.safe]
    best = max(safe, key=lambda point: point.strength, default=None)
    return Score(
        finetune=row.name,
        method=method,
        strength=best.strength if best else None,
        points=best.points if best else None,
        false_refusal=best.false_refusal if best else None,
        kept=best.kept if best else None,
        told_apart=best.told_apart if best else bool(curve) and all(point.told_apart for point in curve),
        request_seconds=3.5,
    )


def contests_of(row, scores):
    kept = {s.method: s.kept.value for s in scores if s.finetune == row.name and s.kept}
    leader = max(kept, key=kept.get, default=None)
    for other, value in kept.items():
        if other != leader:
            difference = kept[leader] - value
            yield Contest(
                finetune=row.name,
                leader=leader,
                other=other,
                kept=estimate(difference, 0.08, 300, "bootstrap"),
                points=estimate(1.5, 2.0, 150, "newcombe"),
                false_refusal=estimate(-2.5, 4.0, 100, "newcombe"),
                p_value=0.01 if difference > 0.08 else 0.4,
                told_apart=difference > 0.08,
            )


def bench_report(methods=METHODS, **changes):
    curves, scores = [], []
    for index, row in enumerate(FINETUNES):
        for m, method in enumerate(methods):
            curve = [point_of(index, row, m, method, strength) for strength in STRENGTHS]
            curves += curve
            scores.append(score_of(row, method, curve))
    values = {
        "environment": ENVIRONMENT,
        "preset": "quick",
        "settings": {
            "attack_prompts": 150,
            "aligned": "/home/someone/models/aligned",
            "pretrained": None,
            "preset": {"name": "quick", "cache": ["~/someone/cache", {"data": "/home/someone/prompts.csv"}]},
        },
        "aligned": "/home/someone/models/aligned",
        "command": (
            "deltaguard bench /home/someone/models/aligned --attack-prompts='/home/someone/my prompts.csv' "
            "--pretrained owner/name -o out"
        ),
        "bound": 2.0,
        "seeds": SEEDS,
        "finetunes": FINETUNES,
        "cells": tuple(
            row for index, f in enumerate(FINETUNES) for seed in SEEDS for row in cells_of(index, f, seed)
        ),
        "curves": tuple(curves),
        "scores": tuple(scores),
        "contests": tuple(contest for row in FINETUNES for contest in contests_of(row, scores)),
        "notes": (f"One judge: refusal openings {ATTACK}.", "With 150 prompts a rate is uncertain."),
        "seconds": {
            "store": 44.0,
            "safe": 60.0,
            "task-harmful-seed0": 300.0,
            "harmful-seed1-retrained-0a1b2c3d": 80.0,
            "request": 150.0,
            "measure": 1350.0,
            "total": 1984.0,
        },
    }
    return BenchReport(**(values | changes))


def without_share(report, finetune, methods):
    """A report in which some methods keep no share of one fine-tune's gain that has a bounded interval."""
    curves = tuple(
        point.model_copy(update={"kept": None})
        if point.finetune == finetune and point.method in methods
        else point
        for point in report.curves
    )
    return report.model_copy(update={"curves": curves})
