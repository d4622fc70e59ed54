"""The experiments: each yields its rows, the first being the usual way wherever there is one.

The usual way is the product's `kfac` with whole spectra: an experiment is about one thing at a time, and how
far a spectrum may be cut off is another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tools.experiments import ExperimentRow

from benchmarks.experiments.adaptive import evade, predicted_kl
from benchmarks.experiments.curvatures import (
    blocks,
    curvatures,
    diagonal,
    input_spectra,
    stored,
    trace,
    weighted,
    with_tail,
)
from benchmarks.experiments.laboratory import Laboratory, Trial, share
from benchmarks.experiments.refine import Refiner
from benchmarks.experiments.sums import Totals, measure_sums, own, sampled, softmax, total
from benchmarks.experiments.task_aware import task_aware
from deltaguard.chat.conversations import Conversation, build_conversations
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.calibrate import store_limit
from deltaguard.curvature.contents import share_within
from deltaguard.curvature.observe import Observed
from deltaguard.curvature.sums import Group
from deltaguard.evaluation.metrics.rates import Rate, estimate
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.restoration.curvature import Spectra
from deltaguard.solvers import joint_profile, project
from deltaguard.studies.data import IDENTITY_SYSTEM

LOOSER = 10
"""Times the limit that some experiments look at beside it."""

LOOSENED = (10, 30, 100)
"""The same of the experiment on system prompts."""

ATTACKERS = (0.0, 0.01, 0.1, 1.0)
"""What adaptive attackers pay for predicted safety KL, as shares of the price of the usual way."""

_DEAREST = 1e15
"""A price at which nothing is left but what is free."""

Rows = Iterator[ExperimentRow]

PARTS = (8, 8, 16, 32)
"""Conversations of the parts that sums are kept of, for each half of the categories of harm."""

MANY = 512
"""Conversations of the largest calibration, under several system prompts each."""

WEIGHING = 32
"""Calibration conversations on which the weights of blocks are measured."""

EPOCHS = 2
"""Passes of the adaptive attacker over the data: shrinking after every few steps slows training down."""


@dataclass(frozen=True)
class Setting:
    """What all experiments start from.

    Attributes:
        lab: the fine-tune.
        limit: safety KL that every candidate is brought to.
        aligned: folder of the aligned model.
        model: the aligned model, loaded.
        observed: its groups of layers.
        parts: files of sums over calibration conversations: of one half of the categories of harm, and of
            the other, each with as many conversations as `PARTS` says.
        batches: the calibration conversations themselves.
        calibration: the same as they are, of both halves in turn.
        held_out: those that safety KL is measured on: all, and those of the first half alone.
        in_second_half: for each harmful request asked, whether its category is in the second half.
        data: what the fine-tune was trained on.
        read: conversations as batches.
        answered: conversations with what the aligned model answers.
        identity: the identity shift of the same aligned model, measured on some conversations.
        spectra: curvature taken as the product takes it, from all parts, not cut off.
        usual: the row of that.
        price: the price of that row.
    """

    lab: Laboratory
    limit: float
    aligned: Path
    model: Any
    observed: Sequence[Observed]
    parts: tuple[Sequence[Path], Sequence[Path]]
    batches: Sequence[Batch]
    calibration: Sequence[Conversation]
    held_out: tuple[Sequence[Conversation], Sequence[Conversation]]
    in_second_half: Sequence[bool]
    data: Sequence[Conversation]
    read: Callable[[Sequence[Conversation]], list[Batch]]
    answered: Callable[[Sequence[Conversation]], list[Conversation]]
    identity: Callable[[Sequence[Conversation]], Laboratory]
    spectra: Mapping[str, Spectra]
    usual: ExperimentRow
    price: float

    def sums(self, used: int = len(PARTS)) -> Totals:
        """Over the first parts of both halves."""
        return total([*self.parts[0][:used], *self.parts[1][:used]])

    def usual_as(self, experiment: str, variant: str) -> ExperimentRow:
        """The row of the usual way under another name."""
        return self.usual.model_copy(update={"experiment": experiment, "variant": variant, "lead": None})


def labels(setting: Setting) -> Rows:
    """What G is made of."""
    name = "labels of G"
    yield setting.usual_as(name, "drawn from the model")
    inputs = input_spectra(setting.observed, setting.spectra)
    for objective, variant in ((own, "its own answers"), (softmax, "whole softmax, random signs")):
        sums = measure_sums(setting.model, setting.observed, setting.batches, objective)
        found = curvatures(setting.observed, sums, inputs=inputs)
        yield setting.lab.row(name, variant, setting.lab.closed_form(found), setting.limit, setting.usual)


def parts_of_g(setting: Setting) -> Rows:
    """How much of G is needed."""
    name = "parts of G"
    yield setting.usual_as(name, "all of it")
    inputs, sums = input_spectra(setting.observed, setting.spectra), setting.sums()
    for variant, outputs in (("blocks of 64", blocks), ("its diagonal", diagonal), ("its trace", trace)):
        found = curvatures(setting.observed, sums, outputs=outputs, inputs=inputs)
        yield setting.lab.row(name, variant, setting.lab.closed_form(found), setting.limit, setting.usual)


def small_store(setting: Setting) -> Rows:
    """What of the spectra a store keeps, at the limit and at `LOOSER` times as much."""
    name, lab, limit = "store", setting.lab, setting.limit
    yield setting.usual_as(name, "whole spectra")
    quarter = _as_stored(setting)
    of_quarter = "a quarter of the model's bytes"
    yield lab.row(name, of_quarter, lab.closed_form(quarter), limit, setting.usual)
    mean = _with_tails(quarter, setting.spectra, arithmetic=True)
    yield lab.row(name, "a quarter, tail the arithmetic mean", lab.closed_form(mean), limit, setting.usual)
    limit *= LOOSER
    first = lab.row(name, f"whole spectra, {limit:g}", lab.closed_form(setting.spectra), limit)
    yield first
    yield lab.row(name, f"{of_quarter}, {limit:g}", lab.closed_form(quarter), limit, first)
    free = lab.closed_form(_with_tails(quarter, setting.spectra, arithmetic=False))
    left = {n: w - lab.base[n] for n, w in free.at(_DEAREST)}
    predicted = free.profile.predicted_kl(_DEAREST)
    yield lab.measured(name, "a quarter, tail zero, any price", left, predicted, None)


def _as_stored(setting: Setting) -> dict[str, Spectra]:
    sums = setting.sums()
    groups = [Group(g.name, g.in_features, sums.tokens, g.layers) for g in setting.observed]
    cut = stored(share_within(groups, store_limit(Checkpoint.open(setting.aligned))))
    inputs = {g.name: cut(sums.inputs[g.name] / sums.tokens) for g in groups}
    return curvatures(setting.observed, sums, outputs=cut, inputs=inputs)


def _with_tails(
    found: Mapping[str, Spectra], whole: Mapping[str, Spectra], *, arithmetic: bool
) -> dict[str, Spectra]:
    return {
        name: Spectra(
            with_tail(each.inputs, whole[name].inputs, arithmetic=arithmetic),
            with_tail(each.outputs, whole[name].outputs, arithmetic=arithmetic),
        )
        for name, each in found.items()
    }


def tokens_of_h(setting: Setting) -> Rows:
    """Which tokens H is made of."""
    name = "tokens of H"
    yield setting.usual_as(name, "all")
    sums = measure_sums(setting.model, setting.observed, setting.batches, sampled, answers_only=True)
    found = {
        layer: Spectra(each.inputs, setting.spectra[layer].outputs)
        for layer, each in curvatures(setting.observed, sums, outputs=trace).items()
    }
    trial = setting.lab.closed_form(found)
    yield setting.lab.row(name, "those that predict the answer", trial, setting.limit, setting.usual)


def conversations(setting: Setting) -> Rows:
    """How many conversations are needed."""
    name = "conversations"
    yield setting.usual_as(name, str(2 * sum(PARTS)))
    for used in range(1, len(PARTS)):
        trial = setting.lab.closed_form(curvatures(setting.observed, setting.sums(used)))
        yield setting.lab.row(name, str(2 * sum(PARTS[:used])), trial, setting.limit, setting.usual)
        del trial
    trial = setting.lab.closed_form(curvatures(setting.observed, sums_over_many(setting)))
    yield setting.lab.row(name, str(MANY), trial, setting.limit, setting.usual)


def sums_over_many(setting: Setting) -> Totals:
    """Over the calibration conversations and further ones: other prompts, and the same in other settings."""
    known = {(each.prompt, each.system) for each in setting.calibration}
    others = [
        each for each in build_conversations(MANY + len(known)) if (each.prompt, each.system) not in known
    ]
    further = setting.read(setting.answered(others[: MANY - len(setting.calibration)]))
    sums = setting.sums()
    sums.add(measure_sums(setting.model, setting.observed, further, sampled))
    return sums


def categories(setting: Setting) -> Rows:
    """Calibrated and dialled on half of the categories of harm, attacked with the other half."""
    name = "attacked with other categories"
    yield _of_second_half(setting, setting.lab.references()[0], name, "aligned")
    first: ExperimentRow | None = None
    for variant, sums, held_out in (
        ("calibrated on all", setting.sums(len(PARTS) - 1), setting.held_out[0][: len(setting.held_out[1])]),
        ("calibrated on the others", total(setting.parts[0]), setting.held_out[1]),
    ):
        with setting.lab.held_out(held_out):
            trial = setting.lab.closed_form(curvatures(setting.observed, sums))
            row = setting.lab.row(name, variant, trial, setting.limit, first)
        first = first or row
        yield _of_second_half(setting, row, name, variant)


def _of_second_half(setting: Setting, row: ExperimentRow, name: str, variant: str) -> ExperimentRow:
    """The same row, of the harmful requests only those of the second half of the categories."""
    kept = "".join(c for c, second in zip(row.attack, setting.in_second_half, strict=True) if second)
    return row.model_copy(
        update={
            "experiment": name,
            "variant": variant,
            "attack": kept,
            "attack_success": share(estimate(Rate.of(letter == "c" for letter in kept))),
        }
    )


def other_parameters(setting: Setting) -> Rows:
    """Where norms come from; the fine-tune leaves embeddings as they were."""
    name = "norms"
    yield setting.usual_as(name, "aligned")
    setting.lab.settle_finetuned()
    try:
        trial = setting.lab.closed_form(setting.spectra)
        yield setting.lab.row(name, "fine-tuned", trial, setting.limit, setting.usual)
    finally:
        setting.lab.settle_aligned()


def layer_weights(setting: Setting) -> Rows:
    """Each block's G weighed by what its own delta costs when measured."""
    name = "weights of blocks"
    yield setting.usual_as(name, "all alike")
    lab, spectra = setting.lab, setting.spectra
    projections = {n: project(d, spectra[n].inputs, spectra[n].outputs) for n, d in lab.deltas.items()}
    nothing = {n: torch.zeros_like(d) for n, d in lab.deltas.items()}
    found: dict[str, float] = {}
    with lab.held_out(setting.calibration[:WEIGHING]):
        for block in dict.fromkeys(map(_block, lab.deltas)):
            inside = [n for n in lab.deltas if _block(n) == block]
            deltas = nothing | {n: projections[n].restored(setting.price) for n in inside}
            lab.meter.put(lab.weights(deltas.items()))
            parts = joint_profile(projections[n].directions.profile() for n in inside)
            measured = max(lab.meter.measure().mean, 0.0)
            found |= dict.fromkeys(inside, measured / parts.predicted_kl(setting.price))
    mean = sum(found.values()) / len(found)
    weights = {n: max(weight / mean, 0.01) for n, weight in found.items()}
    trial = replace(lab.closed_form(weighted(spectra, weights)), predicts=False)
    yield lab.row(name, "by measured safety KL", trial, setting.limit, setting.usual)


def _block(name: str) -> str:
    """The number of the decoder block in a tensor's name."""
    return next(part for part in name.split(".") if part.isdigit())


def second_step(setting: Setting) -> Rows:
    """A step re-linearised at the restored model."""
    name = "second step"
    yield setting.usual_as(name, "none")
    lab, spectra = setting.lab, setting.spectra
    refiner = Refiner(lab, setting.model, setting.batches)
    projections = {n: project(d, spectra[n].inputs, spectra[n].outputs) for n, d in lab.deltas.items()}
    profile = joint_profile(p.directions.profile() for p in projections.values())
    known: dict[float, dict[str, torch.Tensor]] = {}

    def refined(mu: float) -> dict[str, torch.Tensor]:
        if mu not in known:
            known[mu] = refiner.step({n: p.restored(mu) for n, p in projections.items()}, spectra, mu)
        return known[mu]

    start = setting.price / 2
    trial = Trial(lambda mu: lab.weights(refined(mu).items()), profile, start=start, predicts=False)
    yield lab.row(name, "one, at the restored model", trial, setting.limit, setting.usual)


def task_data(setting: Setting) -> Rows:
    """The task's own curvature, from the data of the fine-tune."""
    name = "curvature of the task"
    yield setting.usual_as(name, "unknown")
    batches = setting.read(setting.data)
    task = curvatures(setting.observed, measure_sums(setting.model, setting.observed, batches, sampled))
    for damping in (1.0, 0.1):
        yield _knowing_the_task(setting, name, task, damping)


def _knowing_the_task(
    setting: Setting, name: str, task: Mapping[str, Spectra], damping: float
) -> ExperimentRow:
    """One row; two of these trials do not fit into memory together."""
    trial = task_aware(setting.lab, setting.spectra, task, damping=damping)
    return setting.lab.row(name, f"known, damped by {damping:g}", trial, setting.limit, setting.usual)


def system_prompt(setting: Setting) -> Rows:
    """The identity shift is used under a system prompt of its own, which calibration has not seen.

    Its utility is the likelihood of answers in that identity. Safety KL is measured under the system prompt
    where the dial knows it, at the limit and at `LOOSENED` times as much.
    """
    name = "system prompt of the identity shift"
    plain, limit = setting.held_out[0], setting.limit
    lab = setting.identity(setting.answered(_under_identity(plain)))
    for row in lab.references():
        yield row.model_copy(update={"experiment": name})
    unaware = lab.closed_form(setting.spectra)
    with lab.held_out(plain):
        yield lab.row(name, "not known", unaware, limit)
    aware = lab.closed_form(_curvature_under_identity(setting))
    for factor in (1, *LOOSENED):
        at = f"{factor * limit:g}"
        first = lab.row(name, f"known to the dial, {at}", unaware, factor * limit)
        yield first
        yield lab.row(name, f"and to the curvature, {at}", aware, factor * limit, first)


def _curvature_under_identity(setting: Setting) -> dict[str, Spectra]:
    conversations = setting.answered(_under_identity(setting.calibration))
    sums = measure_sums(setting.model, setting.observed, setting.read(conversations), sampled)
    return curvatures(setting.observed, sums)


def _under_identity(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The same requests under the system prompt of the identity shift, not answered."""
    prompts = dict.fromkeys(each.prompt for each in conversations)
    return [Conversation(prompt, IDENTITY_SYSTEM) for prompt in prompts]


def adaptive_attack(setting: Setting) -> Rows:
    """Fine-tunes that keep their predicted safety KL small: let through, restored by prediction, dialled.

    The attacker's price is that of the usual way; at price 0 it is no more than the same training.
    """
    name = "adaptive attack"
    lab, spectra = setting.lab, setting.spectra
    allowed, plain = setting.usual.predicted_kl or 0.0, dict(lab.deltas)
    for part in ATTACKERS:
        attacker = f"price {part:g}"
        evasive = evade(setting.aligned, setting.data, spectra, mu=part * setting.price, epochs=EPOCHS)
        lab.deltas.update(evasive)
        own = predicted_kl(lab, spectra)
        whole = lab.measured(name, f"{attacker}, as it is", evasive, own, None)
        yield whole
        trial = lab.closed_form(spectra)
        mu = trial.profile.mu_of_share(min(allowed / own, 1.0))
        restored = {n: w - lab.base[n] for n, w in trial.at(mu)}
        predicted = trial.profile.predicted_kl(mu)
        yield lab.measured(name, f"{attacker}, restored by prediction", restored, predicted, None)
        dialled = f"{attacker}, restored by the dial"
        if whole.safety_kl <= setting.limit:
            yield whole.model_copy(update={"variant": f"{dialled}: kept whole"})
        else:
            start = replace(trial, start=max(mu, setting.price / 10))
            yield lab.row(name, dialled, start, setting.limit, None)
    lab.deltas.update(plain)


EXPERIMENTS: Mapping[str, Callable[[Setting], Rows]] = MappingProxyType(
    {
        "labels": labels,
        "parts": parts_of_g,
        "store": small_store,
        "tokens": tokens_of_h,
        "conversations": conversations,
        "categories": categories,
        "others": other_parameters,
        "weights": layer_weights,
        "second-step": second_step,
        "task-data": task_data,
        "system-prompt": system_prompt,
        "adaptive": adaptive_attack,
    }
)
