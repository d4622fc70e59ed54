"""The one price of safety, μ, of all layers: from a strength, or from the dial by measuring candidates."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.mirror import loadable, output_files
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.restore import Dial, Probe
from deltaguard.restoration.curvature import CurvatureReader
from deltaguard.restoration.edit import edit, projection_of
from deltaguard.restoration.inputs import Inputs, LayerDelta, read_ahead, read_deltas
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.search import best, search
from deltaguard.solvers import Profile, joint_profile
from deltaguard.solvers.profile import PROHIBITIVE

if TYPE_CHECKING:
    from deltaguard.chat.conversations import Conversation
    from deltaguard.restoration.safety_kl import SafetyMeter


@dataclass(frozen=True)
class Price:
    """What was chosen.

    Attributes:
        mu: the price; 0 keeps the whole delta and `PROHIBITIVE` nothing of it.
        dial: how it was found, None where a strength was given.
    """

    mu: Annotated[float, Field(ge=0)]
    dial: Dial | None


def price_of(job: Job, plan: Plan, config: RestoreConfig, progress: Progress | None = None) -> Price | None:
    """The price at which the layers will be restored; None for methods without one.

    Args:
        job: the models and the store.
        plan: what will be done.
        config: the options.
        progress: called as layers are read and candidates measured.

    Raises:
        DeltaguardError: a weight is not finite, the model cannot be run, or no price is within the limit.
    """
    if not config.has_price:
        return None
    report = progress or ignore
    limit = config.dial
    if limit is None:
        return Price(joint_of(job, plan, config, report).mu_of_share(config.chosen_strength), None)
    candidate = Candidate.open(job, plan, config)
    whole = candidate.whole(report)
    if whole.safety_kl <= limit and config.output_format == "checkpoint":
        return Price(0.0, candidate.dial(limit, whole, (), whole))
    candidate.settle()
    probes = _probes(candidate, limit, whole, report)
    found = best(probes, limit)
    if found is None:
        found = _nothing(candidate, limit, report)
        probes = (*probes, found)
    return Price(found.mu, candidate.dial(limit, whole, probes, found))


def _probes(candidate: "Candidate", limit: float, whole: Probe, report: Progress) -> tuple[Probe, ...]:
    """The search, unless all of what may be kept is within the limit."""
    if candidate.config.output_format == "adapter":
        # Of the fine-tuned model it leaves out what no adapter holds.
        free = candidate.probe(0.0, report)
        if free.safety_kl <= limit:
            return (free,)
    joint = joint_of(candidate.job, candidate.plan, candidate.config, report)
    if not joint.predicted_kl(0) > 0:
        return ()
    start = first_price(joint, limit, whole.safety_kl)
    return search(lambda mu: candidate.probe(mu, report), joint.predicted_kl, limit, start=start)


def joint_of(job: Job, plan: Plan, config: RestoreConfig, report: Progress) -> Profile:
    """How the delta of all layers together is spread over prices.

    Raises:
        DeltaguardError: a weight is not finite.
    """
    steps = restored_steps(plan)
    parts: list[Profile] = []
    for number, inputs in enumerate(restored_deltas(job, steps, config), start=1):
        projection = projection_of(inputs)
        if projection is not None:
            parts.append(projection.directions.profile())
        report(Event("project", number, len(steps)))
    return joint_profile(parts)


def restored_steps(plan: Plan) -> tuple[Step, ...]:
    """The steps that a solver decides."""
    return tuple(step for step in plan.steps if step.action is Action.RESTORE)


def restored_inputs(job: Job, steps: tuple[Step, ...], config: RestoreConfig) -> Iterator[Inputs]:
    """What they need, read ahead."""
    return read_ahead(steps, job.aligned, job.finetuned, _curvature_reader(job, steps, config))


def restored_deltas(job: Job, steps: tuple[Step, ...], config: RestoreConfig) -> Iterator[LayerDelta]:
    """What work on their deltas alone needs, read ahead."""
    return read_deltas(steps, job.aligned, job.finetuned, _curvature_reader(job, steps, config))


def _curvature_reader(job: Job, steps: tuple[Step, ...], config: RestoreConfig) -> CurvatureReader | None:
    uses = Counter(step.group for step in steps if step.group)
    return CurvatureReader(job.store, config.method, uses) if job.store else None


@dataclass(frozen=True)
class Candidate:
    """A model in memory that takes on the weights of one price after another."""

    job: Job
    plan: Plan
    config: RestoreConfig
    meter: "SafetyMeter"
    conversations: int

    @classmethod
    def open(
        cls, job: Job, plan: Plan, config: RestoreConfig, tasks: "Sequence[Conversation]" = ()
    ) -> "Candidate":
        """Load the aligned model and keep what it predicts on held-out safety conversations.

        In float32 whatever the checkpoint's dtype: rounding logits to half precision changes predictions by
        more than the safety KL that is looked for. Candidates are run and asked with the very files that the
        output will have.

        Args:
            job: the models and the store.
            plan: what will be done.
            config: the options.
            tasks: conversations of which the aligned model's likelihood is kept too.

        Raises:
            DeltaguardError: it cannot be loaded, or does not fit into memory.
        """
        from deltaguard.restoration.safety_kl import SafetyMeter

        store = known_store(job)
        is_adapter = config.output_format == "adapter"
        files = output_files(job.aligned, job.finetuned, config_from=config.config_from, adapter=is_adapter)
        with loadable(files) as output:
            meter = SafetyMeter.open(
                job.aligned,
                job.finetuned,
                store.held_out,
                tasks=tasks,
                output=output,
                device=find_device(config.device),
                dtype=torch.float32,
                batch_size=store.provenance.batch_size,
                max_length=store.provenance.max_length,
            )
        return cls(job, plan, config, meter, len(store.held_out))

    def whole(self, report: Progress) -> Probe:
        """The fine-tuned model as it is, with all its tensors.

        Raises:
            DeltaguardError: its predictions are not finite; the tensors that are not are listed.
        """
        finetuned = self.job.finetuned
        self.meter.put(
            (name, finetuned.read(name).to(DTYPES[info.dtype])) for name, info in finetuned.tensors.items()
        )
        report(Event("measure", 1, 1))
        try:
            return self._measured(0.0)
        except DeltaguardError as error:
            if problems := _not_finite(finetuned):
                raise DeltaguardError(listed(f"{finetuned.reference} cannot be run", problems)) from error
            raise

    def settle(self) -> None:
        """Take the tensors that no solver decides from where the plan takes them."""
        others = [step for step in self.plan.steps if step.action is not Action.RESTORE]
        self._put(read_ahead(others, self.job.aligned, self.job.finetuned, None), None)

    def probe(self, mu: float, report: Progress) -> Probe:
        """The candidate of one price."""
        steps = restored_steps(self.plan)
        self._put(restored_inputs(self.job, steps, self.config), mu)
        report(Event("measure", 1, 1))
        return self._measured(mu)

    def dial(self, limit: float, whole: Probe, probes: tuple[Probe, ...], found: Probe) -> Dial:
        """The report of a search that ended with a probe."""
        return Dial(
            limit=limit,
            device=str(find_device(self.config.device)),
            conversations=self.conversations,
            tokens=self.meter.tokens,
            finetuned_kl=whole.safety_kl,
            restored_kl=found.safety_kl,
            restored_margin=found.margin,
            whole=found is whole,
            probes=(whole, *probes),
        )

    def _measured(self, mu: float) -> Probe:
        found = self.meter.measure()
        return Probe(mu=mu, safety_kl=found.mean, margin=found.margin)

    def _put(self, inputs: Iterator[Inputs], mu: float | None) -> None:
        self.meter.put(self._edited(each, mu) for each in inputs)

    def _edited(self, inputs: Inputs, mu: float | None) -> tuple[str, Tensor]:
        info = inputs.step.info
        return info.name, edit(inputs, self.config, mu, DTYPES[info.dtype]).tensor


def known_store(job: Job) -> CurvatureStore:
    """The store of a job whose method needs one."""
    assert job.store is not None, "a method with a price has a store"  # noqa: S101
    return job.store


def _not_finite(source: WeightSource) -> list[str]:
    """What is wrong with each tensor that holds NaN or infinite entries."""
    bad = {name: int((~source.read(name).isfinite()).sum()) for name in source.tensors}
    return [f"tensor `{name}` holds {n} entries that are NaN or infinite" for name, n in bad.items() if n]


def first_price(joint: Profile, limit: float, whole: float) -> float:
    """A first guess at the price whose safety KL is `limit`, when that of the whole delta is `whole`.

    Far from the aligned model safety KL grows more slowly than predicted, so that a share x of the whole's
    takes less than x of what is predicted for it. The power 1.5 is a guess, which the search corrects.
    """
    return joint.mu_of_share(min(limit / max(whole, limit), 0.99) ** 1.5) or 1.0


def _nothing(candidate: Candidate, limit: float, report: Progress) -> Probe:
    """What is left where no probe was within the limit: the aligned layers, if those are."""
    aligned = candidate.probe(PROHIBITIVE, report)
    if aligned.safety_kl > limit:
        causes: dict[str, str] = {}
        if candidate.config.config_from == "finetuned":
            causes["configuration, tokenizer or chat template"] = "--config-from aligned"
        if candidate.config.other_params == "finetuned":
            causes["norms, biases or embeddings"] = "--other-params aligned"
        what = (
            ", or ".join(causes) or "tensors, or rows of the vocabulary, that the fine-tuned model alone has"
        )
        done = f"Take them from the aligned model ({', '.join(causes.values())})" if causes else "Remove them"
        raise DeltaguardError(
            f"With no delta left in any layer the safety KL is still {aligned.safety_kl:.2g}, above "
            f"{limit:.2g}: what differs are {what}. {done}, or allow more."
        )
    return aligned
