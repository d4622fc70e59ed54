"""What kept a restore from keeping more, and how a report says so."""

import pytest

from deltaguard.reports.records.restore import AttackDial, Compared, Dial, Look
from deltaguard.reports.restore import outcome_facts
from restores import restore_report

FEW, MANY = (Compared(prompts=600, aligned=60, candidate=60 + n, only_candidate=n) for n in (6, 60))
WHOLE = Look(mu=0.0, attack_success=MANY, false_refusals=None, accepted=False)
KEPT = Look(mu=8.0, attack_success=FEW, false_refusals=FEW, accepted=True)


def look(mu, *, attack_success=FEW, false_refusals=None, accepted=False):
    return Look(mu=mu, attack_success=attack_success, false_refusals=false_refusals, accepted=accepted)


def dial(*looks, whole=False, training_data="unknown", asks=True):
    attack = AttackDial(
        limit=0.02,
        excluded=0.04,
        confidence=0.95,
        most_looks=6,
        training_data=training_data,
        finetuned=WHOLE,
        restored=WHOLE if whole else KEPT,
        looks=(WHOLE, *looks),
    )
    numbers = {
        "limit": 0.0006,
        "conversations": 64,
        "tokens": 900,
        "finetuned_kl": 0.4,
        "restored_kl": 0.0005,
    }
    return Dial(**numbers, device="cpu", whole=whole, probes=(), attack=attack if asks else None)


LIMIT = "the limit on safety KL, 0.0006 nats a token"
LOOSE = look(2.0, attack_success=MANY)
NEXT = look(4.0, false_refusals=MANY)


@pytest.mark.parametrize(
    ("found", "stopped_by"),
    [
        (dial(whole=True), "nothing"),
        # Of the fine-tuned model, which the first look is at, safety KL is far too large.
        (dial(KEPT), "safety KL"),
        (dial(asks=False), "safety KL"),
        (dial(LOOSE, KEPT), "attack success"),
        (dial(LOOSE, NEXT, KEPT), "false refusals"),
        (dial(NEXT, KEPT, look(3.0, attack_success=MANY)), "false refusals"),
        # What keeps less says nothing of what would keep more.
        (dial(KEPT, look(16.0, attack_success=MANY)), "safety KL"),
        # Answers that pass beyond the limit of safety KL.
        (dial(look(4.0, false_refusals=FEW, accepted=True), KEPT), "safety KL"),
    ],
)
def test_the_limit_that_was_met_first_is_named(found, stopped_by):
    assert found.stopped_by == stopped_by


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (dial(KEPT), f"{LIMIT} for unknown training data (`--training-data trusted` allows more"),
        (dial(KEPT, training_data="trusted"), f"{LIMIT} for trusted training data"),
        (dial(KEPT, training_data=None), LIMIT),
        (dial(asks=False), LIMIT),
        (
            dial(LOOSE, KEPT),
            "the limit on attack success: +10.0 points in the next candidate that keeps more",
        ),
        (dial(LOOSE, NEXT, KEPT), "the limit on false refusals: +10.0 points in the next candidate"),
    ],
)
def test_a_report_says_what_would_keep_more(found, told):
    assert dict(outcome_facts(restore_report(dial=found)))["not more, because of"].startswith(told)


def test_of_a_fine_tune_that_is_kept_whole_it_says_nothing():
    assert "not more, because of" not in dict(outcome_facts(restore_report(dial=dial(whole=True))))
    assert "not more, because of" not in dict(outcome_facts(restore_report(dial=None)))
