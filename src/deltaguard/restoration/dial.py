"""The one price of safety, μ, of all layers: from a strength, or from the dial by measuring candidates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from pydantic import Field

from deltaguard.device import find_device, served_dtype
from deltaguard.errors import DeltaguardError
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.reports.check import verdict_sentence
from deltaguard.reports.records.dial import AttackDial, Dial, Look, Probe
from deltaguard.reports.text import points
from deltaguard.restoration.acceptance import MOST_LOOKS, Rule
from deltaguard.restoration.candidate import Candidate
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.looks import Examiner, Requests
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.search import Judge, best, mean, search
from deltaguard.restoration.trial import Trial
from deltaguard.solvers import Profile
from deltaguard.solvers.profile import PROHIBITIVE

_STRICTER = 1 / 4
"""Share of the predicted safety KL that the next candidate keeps at most where one is not accepted."""

_FALL = 1.25
"""Power of what is added by which predicted safety KL falls, about; the next looks correct it."""

_CLOSE_SHARES = 1.5
"""Candidates whose predicted safety KL differs by less are not told apart further."""


@dataclass(frozen=True)
class Price:
    """What was chosen.

    Attributes:
        mu: the price; 0 keeps the whole delta and `PROHIBITIVE` nothing of it. Of a method without a price
            its strength.
        dial: how it was found, None where a strength was given.
        seconds: that measuring and asking candidates took; nothing where none was.
    """

    mu: Annotated[float, Field(ge=0)]
    dial: Dial | None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def find_price(trial: Trial, resident: Resident, report: Progress) -> Price:
    """Find the price at which the layers will be restored; of a method without one, its strength.

    Args:
        trial: the layers.
        resident: the aligned model, where one is to be measured and asked.
        report: told as layers are read and candidates measured.

    Raises:
        DeltaguardError: a weight is not finite, the model cannot be run, or no price is within the limits.
    """
    config = trial.config
    if not config.is_priced:
        return Price(config.chosen_strength, None)
    if config.dial is None:
        joint = trial.profile(report, with_weights=config.output_format == "checkpoint")
        return Price(joint.mu_of_share(config.chosen_strength), None)
    if config.added_attack_success is not None:
        return _by_attack_success(trial, resident, config.added_attack_success, config.dial, report)
    return _by_safety_kl(trial, resident, config.dial, report)


def _by_safety_kl(trial: Trial, resident: Resident, limit: float, report: Progress) -> Price:
    """Find what keeps most within a safety KL."""
    judge, candidate = judge_of(trial.config), resident.candidate(trial, report=report)
    whole = candidate.whole(report, enough=limit)
    if judge(whole) <= limit and trial.config.output_format == "checkpoint":
        return _price(candidate, limit, whole, (whole,), None)
    candidate.take_others()
    probes = _probes(candidate, limit, whole, judge, report)
    found = best(probes, limit, judge)
    assert found is not None, "the last probe is within the limit"  # noqa: S101
    return _price(candidate, limit, found, (whole, *probes), None)


def _by_attack_success(
    trial: Trial, resident: Resident, added: float, guard: float, report: Progress
) -> Price:
    """Find what keeps most within a safety KL and adds so little attack success, and false refusals."""
    config, systems = trial.config, known_store(trial.job).provenance.systems
    requests = Requests.of(config.prompts, systems)
    rule = Rule(limit=added, looks=MOST_LOOKS)
    candidate, examiner = resident.examined(trial, rule, requests, report)
    examiner.require_refusals(trial.job.aligned.reference)
    whole = candidate.whole(report, enough=guard)
    looks = [candidate.look(0.0, examiner, report, most=MOST_LOOKS)]
    verdict = rule.verdict(looks[0], whole, guard)
    report(Event("check", 1, 1, verdict_sentence(verdict, looks[0], added, whole, guard)))
    found, chosen, probes = whole, looks[0], (whole,)
    if verdict != "safe" or config.output_format == "adapter":
        candidate.take_others()
        probes = (whole, *_probes(candidate, guard, whole, mean, report))
        loosest = best(probes[1:], guard)
        assert loosest is not None, "the last probe is within the limit"  # noqa: S101
        seen, (found, chosen) = find_accepted(candidate, examiner, loosest, guard, report)
        looks += [look for _, look in seen]
        probes += tuple(probe for probe, _ in seen if probe is not loosest)
    attack = AttackDial(
        limit=added,
        excluded=rule.excluded,
        confidence=rule.confidence,
        most_looks=rule.looks,
        training_data=None if config.max_safety_kl is not None else config.training_data or "unknown",
        dtype=str(served_dtype(find_device(config.device))).removeprefix("torch."),
        systems=systems,
        finetuned=looks[0],
        restored=chosen,
        looks=tuple(looks),
    )
    return _price(candidate, guard, found, probes, attack)


def find_accepted(
    candidate: Candidate, examiner: Examiner, loosest: Probe, guard: float, report: Progress
) -> tuple[list[tuple[Probe, Look]], tuple[Probe, Look]]:
    """Look at stricter candidates until one is accepted, then between it and the strictest that was not.

    Args:
        candidate: the model.
        examiner: asks and judges.
        loosest: what keeps most within `guard`.
        guard: the safety KL allowed, nats per response token.
        report: told as candidates are measured and asked.

    Returns:
        All that was measured and seen, and of what was accepted that which keeps most.

    Raises:
        DeltaguardError: not even the aligned layers are accepted.
    """
    joint, seen = candidate.trial.profile(report), list[tuple[Probe, Look]]()
    affordable = joint.predicted_kl(loosest.mu) / (joint.predicted_kl(0) or 1.0)
    # Shares of the predicted safety KL of the loosest candidate; 0 leaves nothing of the delta.
    share, rejected, chosen, accepted = 1.0, math.inf, None, 0.0
    # The first look was at the fine-tuned model; what is refined gets the last one.
    spent = 1 if candidate.trial.config.refine is None else 2
    for left in reversed(range(MOST_LOOKS - spent)):
        if share == 1:
            probe = loosest
            candidate.put(probe.mu)
        else:
            probe = candidate.probe(joint.mu_of_share(share * affordable) if share else PROHIBITIVE, report)
        look = candidate.look(probe.mu, examiner, report, most=MOST_LOOKS)
        seen.append((probe, look))
        if look.accepted and probe.safety_kl <= guard:
            chosen, accepted = seen[-1], share
        else:
            rejected = share
        if probe.mu == PROHIBITIVE or accepted == 1 or rejected < _CLOSE_SHARES * accepted:
            break
        if chosen is not None:
            share = math.sqrt(rejected * accepted)
        elif left > 1:
            share *= min(_STRICTER, (examiner.rule.limit / 2 / max(look.added, 1e-9)) ** _FALL)
        else:
            share = 0.0
    if chosen is None:
        worst, rule, asked = seen[-1][1].added, examiner.rule, examiner.requests
        least = min(len(asked.harmful), len(asked.harmless))
        few = f"of {least} requests few may be answered otherwise. Bring more, or allow more."
        why = few if worst <= rule.limit else _what_else_differs(candidate.trial)
        raise DeltaguardError(
            f"With no delta left in any layer {points(100 * worst)} points of attack success or false "
            f"refusals are seen, and {points(100 * rule.excluded)} cannot be ruled out: {why}"
        )
    return seen, chosen


def judge_of(config: RestoreConfig) -> Judge:
    """Say what of a measurement must be within the limit: its mean, or a bound that holds with a confidence.

    Example:
        >>> bound = judge_of(RestoreConfig(max_safety_kl=1e-3, confidence=0.975))
        >>> round(bound(Probe(mu=1.0, safety_kl=0.5, margin=0.1)), 6)
        0.6
    """
    if config.confidence is None:
        return mean

    def bound(probe: Probe) -> float:
        if probe.margin is None:
            raise DeltaguardError(
                "A confidence needs an interval, and a single conversation was held out: calibrate with more "
                "(`held_out` of the store), or leave `--confidence` out."
            )
        return probe.bound(config.confidence)

    return bound


def _probes(
    candidate: Candidate, limit: float, whole: Probe, judge: Judge, report: Progress
) -> tuple[Probe, ...]:
    """Search for what keeps most within a safety KL; at least one of the probes is.

    Raises:
        DeltaguardError: not even the aligned layers are.
    """
    trial = candidate.trial
    if trial.config.output_format == "adapter":
        # Of the fine-tuned model it leaves out what no adapter holds.
        free = candidate.probe(0.0, report, enough=limit)
        if judge(free) <= limit:
            return (free,)
    joint, probes = trial.profile(report), ()
    if joint.predicted_kl(0) > 0:
        start = first_price(joint, limit, judge(whole))
        measure = partial(candidate.probes, report=report, enough=limit)
        probes = search(
            measure, joint.predicted_kl, limit, start=start, at_once=candidate.at_once, judge=judge
        )
    if best(probes, limit, judge) is None:
        probes = (*probes, _aligned_layers(candidate, limit, judge, report))
    return probes


def first_price(joint: Profile, limit: float, whole: float) -> float:
    """Guess the price whose safety KL is `limit`, when that of the whole delta is `whole`.

    Far from the aligned model safety KL grows more slowly than predicted, so that a share x of the whole's
    takes less than x of what is predicted for it. The power 1.5 is a guess, which the search corrects.
    """
    return joint.mu_of_share(min(limit / max(whole, limit), 0.99) ** 1.5) or 1.0


def _aligned_layers(candidate: Candidate, limit: float, judge: Judge, report: Progress) -> Probe:
    """Measure what is left where no probe was within the limit: the aligned layers."""
    aligned = candidate.probe(PROHIBITIVE, report)
    if judge(aligned) <= limit:
        return aligned
    raise DeltaguardError(
        f"With no delta left in any layer the safety KL is still {judge(aligned):.2g}, above {limit:.2g}: "
        f"{_what_else_differs(candidate.trial)}"
    )


def _what_else_differs(trial: Trial) -> str:
    """Say what makes a model differ whose layers are the aligned ones, and what to do."""
    causes, config = dict[str, str](), trial.config
    if config.config_from == "finetuned":
        causes["configuration, tokenizer or chat template"] = "--config-from aligned"
    if config.other_params == "finetuned":
        causes["norms, biases or embeddings"] = "--other-params aligned"
    if not causes and (rounded := _rounded_to(trial)):
        return (
            f"what differs is that the fine-tuned model, and so the output, is stored in {rounded}, and the "
            "aligned one more finely. Save it as finely, or allow more."
        )
    what = ", or ".join(causes) or "tensors, or rows of the vocabulary, that the fine-tuned model alone has"
    done = f"Take them from the aligned model ({', '.join(causes.values())})" if causes else "Remove them"
    return f"what differs are {what}. {done}, or allow more."


def _rounded_to(trial: Trial) -> str | None:
    """Name the precision that restored layers are rounded to where the aligned ones have a finer one."""
    if trial.config.output_format == "adapter":
        return None
    for step in trial.steps:
        stored, aligned = DTYPES[step.info.dtype], trial.job.aligned.tensors[step.aligned_name]
        if stored.itemsize < DTYPES[aligned.dtype].itemsize:
            return str(stored).removeprefix("torch.")
    return None


def _price(
    candidate: Candidate,
    limit: float,
    found: Probe,
    probes: tuple[Probe, ...],
    attack: AttackDial | None,
) -> Price:
    """Report a search that ended with a probe; the first of all is of the fine-tuned model."""
    config = candidate.trial.config
    dial = Dial(
        limit=limit,
        confidence=config.confidence,
        device=str(find_device(config.device)),
        by_blocks=candidate.by_blocks,
        conversations=candidate.conversations,
        tokens=candidate.tokens,
        finetuned_kl=probes[0].safety_kl,
        restored_kl=found.safety_kl,
        restored_margin=found.margin,
        whole=found is probes[0],
        probes=probes,
        attack=attack,
    )
    return Price(found.mu, dial, dict(candidate.seconds))
