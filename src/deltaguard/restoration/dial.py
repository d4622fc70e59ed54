"""The one price of safety, μ, of all layers: from a strength, or from the dial by measuring candidates."""

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.mirror import loadable, output_files
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.restore import Dial, Probe
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.search import Judge, best, mean, search
from deltaguard.restoration.trial import Trial
from deltaguard.solvers import Profile
from deltaguard.solvers.profile import PROHIBITIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaguard.chat.conversations import Conversation
    from deltaguard.restoration.safety_kl import SafetyMeter

_MARGIN = NormalDist().inv_cdf(0.975)
"""Standard errors in half of a 95 % interval."""


@dataclass(frozen=True)
class Price:
    """What was chosen.

    Attributes:
        mu: the price; 0 keeps the whole delta and `PROHIBITIVE` nothing of it. Of a method without a price
            its strength.
        dial: how it was found, None where a strength was given.
    """

    mu: Annotated[float, Field(ge=0)]
    dial: Dial | None


def find_price(trial: Trial, report: Progress) -> Price:
    """Find the price at which the layers will be restored; of a method without one, its strength.

    Args:
        trial: the layers.
        report: told as layers are read and candidates measured.

    Raises:
        DeltaguardError: a weight is not finite, the model cannot be run, or no price is within the limit.
    """
    config = trial.config
    if not config.is_priced:
        return Price(config.chosen_strength, None)
    limit = config.dial
    if limit is None:
        joint = trial.profile(report, with_weights=config.output_format == "checkpoint")
        return Price(joint.mu_of_share(config.chosen_strength), None)
    judge = judge_of(config)
    candidate = CandidateModel.open(trial)
    whole = candidate.whole(report, enough=limit)
    if judge(whole) <= limit and config.output_format == "checkpoint":
        return Price(0.0, candidate.dial(limit, whole, (), whole))
    candidate.take_others()
    probes = _probes(candidate, limit, whole, judge, report)
    found = best(probes, limit, judge)
    if found is None:
        found = _aligned_layers(candidate, limit, judge, report)
        probes = (*probes, found)
    return Price(found.mu, candidate.dial(limit, whole, probes, found))


def judge_of(config: RestoreConfig) -> Judge:
    """Say what of a measurement must be within the limit: its mean, or a bound that holds with a confidence.

    Example:
        >>> bound = judge_of(RestoreConfig(confidence=0.975))
        >>> round(bound(Probe(mu=1.0, safety_kl=0.5, margin=0.1)), 6)
        0.6
    """
    if config.confidence is None:
        return mean
    errors = NormalDist().inv_cdf(config.confidence)

    def bound(probe: Probe) -> float:
        if probe.margin is None:
            raise DeltaguardError(
                "A confidence needs an interval, and a single conversation was held out: calibrate with more "
                "(`held_out` of the store), or leave `--confidence` out."
            )
        return probe.safety_kl + errors * probe.margin / _MARGIN

    return bound


def _probes(
    candidate: "CandidateModel", limit: float, whole: Probe, judge: Judge, report: Progress
) -> tuple[Probe, ...]:
    """Search, unless all of what may be kept is within the limit."""
    trial = candidate.trial
    if trial.config.output_format == "adapter":
        # Of the fine-tuned model it leaves out what no adapter holds.
        free = candidate.probe(0.0, report, enough=limit)
        if judge(free) <= limit:
            return (free,)
    joint = trial.profile(report)
    if not joint.predicted_kl(0) > 0:
        return ()
    start = first_price(joint, limit, judge(whole))
    measure = partial(candidate.probe, report=report, enough=limit)
    return search(measure, joint.predicted_kl, limit, start=start, judge=judge)


@dataclass
class CandidateModel:
    """A model in memory that takes on the weights of one price after another.

    Attributes:
        trial: the layers.
        meter: measures its safety KL.
        conversations: how many were held out.
        measured: how many candidates so far.
    """

    trial: Trial
    meter: "SafetyMeter"
    conversations: int
    measured: int = 0

    @classmethod
    def open(cls, trial: Trial, tasks: "Sequence[Conversation]" = ()) -> "CandidateModel":
        """Load the aligned model and keep what it predicts on held-out safety conversations.

        In float32 whatever the checkpoint's dtype: rounding logits to half precision changes predictions by
        more than the safety KL that is looked for. Candidates are run and asked with the very files that the
        output will have.

        Args:
            trial: the layers.
            tasks: conversations of which the aligned model's likelihood is kept too.

        Raises:
            DeltaguardError: it cannot be loaded, or does not fit into memory.
        """
        from deltaguard.restoration.safety_kl import SafetyMeter

        job, config = trial.job, trial.config
        store = known_store(job)
        held_out = store.held_out
        is_adapter = config.output_format == "adapter"
        files = output_files(job.aligned, job.finetuned, config_from=config.config_from, adapter=is_adapter)
        with loadable(files) as output:
            meter = SafetyMeter.open(
                job.aligned,
                job.finetuned,
                held_out,
                tasks=tasks,
                output=output,
                device=find_device(config.device),
                dtype=torch.float32,
                batch_size=store.provenance.batch_size,
                max_length=store.provenance.max_length,
            )
        return cls(trial, meter, len(held_out))

    def whole(self, report: Progress, *, enough: float = math.inf) -> Probe:
        """Measure the fine-tuned model as it is, with all its tensors.

        Args:
            report: told of the measurement.
            enough: as in `SafetyMeter.measure`.

        Raises:
            DeltaguardError: its predictions are not finite; the tensors that are not are listed.
        """
        finetuned = self.trial.job.finetuned
        self.meter.put(
            (name, finetuned.read(name).to(DTYPES[info.dtype])) for name, info in finetuned.tensors.items()
        )
        try:
            return self._measure(0.0, report, enough)
        except DeltaguardError as error:
            if problems := _not_finite(finetuned):
                raise DeltaguardError(listed(f"{finetuned.reference} cannot be run", problems)) from error
            raise

    def take_others(self) -> None:
        """Take the tensors that no method decides from where the plan takes them."""
        self.meter.put(self.trial.others())

    def probe(self, mu: float, report: Progress, *, enough: float = math.inf) -> Probe:
        """Measure the candidate of one price; `enough` is as in `SafetyMeter.measure`."""
        self.meter.put(self.trial.weights(mu))
        return self._measure(mu, report, enough)

    def _measure(self, mu: float, report: Progress, enough: float) -> Probe:
        found = self.meter.measure(enough=enough)
        self.measured += 1
        said = f"safety KL {found.mean:.2g} at price {mu:.3g}"
        report(Event("measure", self.measured, self.measured, said))
        return Probe(mu=mu, safety_kl=found.mean, margin=found.margin, conversations=found.conversations)

    def dial(self, limit: float, whole: Probe, probes: tuple[Probe, ...], found: Probe) -> Dial:
        """Report a search that ended with a probe."""
        config = self.trial.config
        return Dial(
            limit=limit,
            confidence=config.confidence,
            device=str(find_device(config.device)),
            conversations=self.conversations,
            tokens=self.meter.tokens,
            finetuned_kl=whole.safety_kl,
            restored_kl=found.safety_kl,
            restored_margin=found.margin,
            whole=found is whole,
            probes=(whole, *probes),
        )


def first_price(joint: Profile, limit: float, whole: float) -> float:
    """Guess the price whose safety KL is `limit`, when that of the whole delta is `whole`.

    Far from the aligned model safety KL grows more slowly than predicted, so that a share x of the whole's
    takes less than x of what is predicted for it. The power 1.5 is a guess, which the search corrects.
    """
    return joint.mu_of_share(min(limit / max(whole, limit), 0.99) ** 1.5) or 1.0


def _aligned_layers(candidate: CandidateModel, limit: float, judge: Judge, report: Progress) -> Probe:
    """Measure what is left where no probe was within the limit: the aligned layers."""
    aligned = candidate.probe(PROHIBITIVE, report)
    if judge(aligned) <= limit:
        return aligned
    causes: dict[str, str] = {}
    if candidate.trial.config.config_from == "finetuned":
        causes["configuration, tokenizer or chat template"] = "--config-from aligned"
    if candidate.trial.config.other_params == "finetuned":
        causes["norms, biases or embeddings"] = "--other-params aligned"
    what = ", or ".join(causes) or "tensors, or rows of the vocabulary, that the fine-tuned model alone has"
    done = f"Take them from the aligned model ({', '.join(causes.values())})" if causes else "Remove them"
    raise DeltaguardError(
        f"With no delta left in any layer the safety KL is still {judge(aligned):.2g}, above {limit:.2g}: "
        f"what differs are {what}. {done}, or allow more."
    )


def _not_finite(source: WeightSource) -> list[str]:
    """Say what is wrong with each tensor that holds NaN or infinite entries."""
    bad = {name: int((~source.read(name).isfinite()).sum()) for name in source.tensors}
    return [f"tensor `{name}` holds {n} entries that are NaN or infinite" for name, n in bad.items() if n]
