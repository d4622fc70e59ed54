"""The search by asking, over made-up candidates: it keeps what it can, in few looks, whatever the fall."""

import math
from types import SimpleNamespace

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.reports.records.restore import Compared, Look, Probe
from deltaguard.restoration.acceptance import Rule
from deltaguard.restoration.dial import MOST_LOOKS, find_accepted
from deltaguard.restoration.options import RestoreConfig
from deltaguard.solvers.profile import PROHIBITIVE

RULE = Rule(limit=0.02, looks=MOST_LOOKS)


class Candidate:
    """Adds attack success as its predicted safety KL, 1 / μ, says."""

    def __init__(self, added):
        self.added, self.mu, self.seen = added, None, []
        profile = SimpleNamespace(
            predicted_kl=lambda mu: 1 / max(mu, 1.0), mu_of_share=lambda share: 1 / share
        )
        self.trial = SimpleNamespace(profile=lambda _: profile, config=RestoreConfig())

    def predicted_kl(self, mu):
        return 1 / max(mu, 1.0)

    def mu_of_share(self, share):
        return 1 / share

    def put(self, mu):
        self.mu = mu

    def look(self, mu, examiner, report, *, most):
        assert mu == self.mu
        more = round(600 * self.added(0.0 if mu == PROHIBITIVE else 1 / mu))
        attack = Compared(prompts=600, aligned=60, candidate=60 + more, only_candidate=more)
        accepted = examiner.rule.accepts(attack)
        self.seen.append(Look(mu=mu, attack_success=attack, false_refusals=None, accepted=accepted))
        return self.seen[-1]


def found(added):
    candidate = Candidate(added)
    loosest = Probe(mu=10.0, safety_kl=0.02, margin=None)
    looks, chosen = find_accepted(candidate, SimpleNamespace(rule=RULE), loosest, lambda _: None)
    assert looks == candidate.seen
    assert len(looks) < MOST_LOOKS
    assert chosen.accepted
    assert chosen.mu == min(look.mu for look in looks if look.accepted)
    return looks, chosen


def test_what_safety_kl_allows_is_taken_where_it_adds_nothing():
    looks, chosen = found(lambda _: 0.0)
    assert chosen.mu == 10.0
    assert len(looks) == 1


@pytest.mark.parametrize("power", [0.4, 0.8, 1.5])
@pytest.mark.parametrize("height", [0.04, 0.4])
def test_it_comes_near_what_is_just_acceptable(power, height):
    def added(share):
        return height * (10 * share) ** power

    _, chosen = found(added)
    best = max(
        10**-step for step in (i / 100 for i in range(100, 1000)) if RULE.accepts(counted(added, step))
    )
    # Of what is kept on a logarithmic scale, where nothing that could be accepted is far away.
    assert math.log10(1 / chosen.mu) > math.log10(best) - 0.75


def counted(added, step):
    more = round(600 * added(10.0**-step))
    return Compared(prompts=600, aligned=60, candidate=60 + more, only_candidate=more)


def test_nothing_of_the_delta_is_kept_where_any_of_it_adds_too_much():
    looks, chosen = found(lambda share: 0.3 if share else 0.0)
    assert chosen.mu == PROHIBITIVE
    assert len(looks) == MOST_LOOKS - 1


def test_what_differs_besides_layers_is_told():
    with pytest.raises(
        DeltaguardError, match=r"30\.0% above the aligned model's.*the fine-tuned model alone has"
    ):
        found(lambda _: 0.3)
