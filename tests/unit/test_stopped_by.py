"""What kept a restore from keeping more, and how a report says so."""

import pytest

from deltaguard.reports.outcome import outcome_facts
from deltaguard.reports.records.dial import AttackDial, Compared, Dial, Look, Probe
from restores import restore_report

FEW, MANY = (Compared(prompts=600, aligned=60, candidate=60 + n, only_candidate=n) for n in (6, 60))
KEPT = Look(mu=8.0, attack_success=FEW, false_refusals=FEW, accepted=True)
KEEPS = "not more, because of"


def look(mu, *, attack_success=FEW, false_refusals=None, accepted=False):
    return Look(mu=mu, attack_success=attack_success, false_refusals=false_refusals, accepted=accepted)


def probe(mu, safety_kl):
    return Probe(mu=mu, safety_kl=safety_kl, margin=0.0001)


WHOLE, FAR, NEAR = look(0.0, attack_success=MANY), probe(0.0, 0.4), probe(8.0, 0.00058)


def report(*looks, probes=(FAR, NEAR), data="unknown", asks=True, **changes):
    restored = looks[0] if len(looks) == 1 else KEPT
    attack = AttackDial(
        limit=0.02,
        excluded=0.04,
        confidence=0.95,
        most_looks=6,
        training_data=data,
        finetuned=WHOLE,
        restored=restored,
        looks=(WHOLE, *looks),
    )
    numbers = {"limit": 0.0006, "conversations": 64, "tokens": 900, "whole": False, "device": "cpu"}
    numbers |= {"finetuned_kl": probes[0].safety_kl, "restored_kl": probes[-1].safety_kl} | changes
    dial = Dial(**numbers, probes=probes, attack=attack if asks else None)
    return restore_report(dial=dial, mu=restored.mu)


LOOSE, NEXT = look(2.0, attack_success=MANY), look(4.0, false_refusals=MANY)
FREE = Look(mu=0.0, attack_success=FEW, false_refusals=FEW, accepted=True)


@pytest.mark.parametrize(
    ("found", "stopped_by"),
    [
        (report(KEPT, whole=True), "nothing"),
        (report(KEPT), "safety KL"),
        (report(KEPT, asks=False), "safety KL"),
        (report(LOOSE, KEPT), "attack success"),
        (report(LOOSE, NEXT, KEPT), "false refusals"),
        (report(NEXT, KEPT, look(3.0, attack_success=MANY)), "false refusals"),
        # What keeps less says nothing of what would keep more.
        (report(KEPT, look(16.0, attack_success=MANY)), "safety KL"),
        # Answers that pass beyond the limit of safety KL.
        (report(look(4.0, false_refusals=FEW, accepted=True), KEPT), "safety KL"),
        (report(KEPT, probes=(FAR, probe(4.0, 0.0007), probe(8.0, 0.0003))), "safety KL"),
        # The fine-tuned model is within the limit, so that its answers decided.
        (report(KEPT, probes=(probe(0.0, 0.0005), probe(8.0, 0.0004))), "attack success"),
        # All of the delta is kept: an adapter without what no adapter holds, or a price that takes nothing.
        (report(FREE, probes=(FAR, probe(0.0, 0.0003))), "nothing"),
        (report(FREE, probes=(FAR, probe(0.0, 0.00058))), "nothing"),
        (report(KEPT, probes=(FAR, probe(8.0, 0.0003))), "nothing"),
        # Held with a confidence, and not on the mean alone.
        (report(KEPT, asks=False, confidence=0.95, probes=(FAR, probe(8.0, 0.00047))), "safety KL"),
        (report(KEPT, asks=False, confidence=0.999, probes=(FAR, probe(8.0, 0.00043))), "safety KL"),
        (report(KEPT, asks=False, confidence=0.6, probes=(FAR, probe(8.0, 0.00047))), "nothing"),
    ],
)
def test_the_limit_that_was_met_first_is_named(found, stopped_by):
    assert found.stopped_by == stopped_by
    assert (KEEPS in dict(outcome_facts(found))) == (stopped_by != "nothing")


LIMIT = "the limit on safety KL, 0.0006 nats a token"
DOUBT = look(4.0, attack_success=Compared(prompts=600, aligned=60, candidate=66, only_candidate=20))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (report(KEPT), f"{LIMIT} for unknown training data (`--training-data trusted` allows more"),
        (report(KEPT, data="trusted"), f"{LIMIT} for trusted training data"),
        (report(KEPT, data=None), LIMIT),
        (report(KEPT, asks=False), LIMIT),
        (report(LOOSE, KEPT), "the limit on attack success: +10.0 points in the next candidate"),
        (report(LOOSE, NEXT, KEPT), "the limit on false refusals: +10.0 points in the next candidate"),
        (report(DOUBT, KEPT), "the limit on attack success: +4.0 points cannot be ruled out in the next"),
    ],
)
def test_a_report_says_what_would_keep_more(found, told):
    assert dict(outcome_facts(found))[KEEPS].startswith(told)


def test_where_a_strength_decides_nothing_is_said():
    assert KEEPS not in dict(outcome_facts(restore_report(dial=None)))
