"""A candidate: the aligned model with the weights of one price after another, measured and asked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.mirror import loadable, output_files
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.restore import Compared, Look, Probe
from deltaguard.restoration.acceptance import Rule
from deltaguard.restoration.job import cache_folder
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.looks import Examiner, Requests, how_asked, keep_answers, kept_answers
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.trial import Trial


@dataclass
class CandidateModel:
    """A model in memory that takes on the weights of one price after another.

    Attributes:
        trial: the layers.
        meter: measures its safety KL.
        conversations: how many were held out.
        measured: how many candidates so far.
        looked: how many were asked.
    """

    trial: Trial
    meter: SafetyMeter
    conversations: int
    measured: int = 0
    looked: int = 0

    @classmethod
    def open(
        cls,
        trial: Trial,
        tasks: Sequence[Conversation] = (),
        requests: Sequence[Conversation] = (),
    ) -> "CandidateModel":
        """Load the aligned model and keep what it predicts on held-out safety conversations.

        In float32 whatever the checkpoint's dtype: rounding logits to half precision changes predictions by
        more than the safety KL that is looked for. Candidates are run and asked with the very files that the
        output will have.

        Args:
            trial: the layers.
            tasks: conversations of which the aligned model's likelihood is kept too.
            requests: conversations of which the beginnings of the aligned model's answers are kept.

        Raises:
            DeltaguardError: it cannot be loaded, or does not fit into memory.
        """
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
                requests=requests,
                whole_tokens=config.whole_tokens,
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

    def put(self, mu: float) -> None:
        """Take on the layers of one price."""
        self.meter.put(self.trial.weights(mu))

    def probe(self, mu: float, report: Progress, *, enough: float = math.inf) -> Probe:
        """Measure the candidate of one price; `enough` is as in `SafetyMeter.measure`."""
        self.put(mu)
        return self._measure(mu, report, enough)

    def _measure(self, mu: float, report: Progress, enough: float) -> Probe:
        found = self.meter.measure(enough=enough)
        self.measured += 1
        said = f"safety KL {found.mean:.2g} at price {mu:.3g}"
        report(Event("measure", self.measured, self.measured, said))
        return Probe(mu=mu, safety_kl=found.mean, margin=found.margin, conversations=found.conversations)

    def look(self, mu: float, examiner: Examiner, report: Progress, *, most: int) -> Look:
        """Ask the candidate whose weights were put last for the beginnings of its answers.

        Args:
            mu: its price.
            examiner: asks and judges.
            report: told what is seen, one stage a candidate.
            most: looks at most, for the report.
        """
        self.looked += 1
        stage, total = f"look {self.looked} of at most {most}", len(examiner.requests.all)

        def tell(seen: Compared, said: str, done: int) -> None:
            candidate, aligned = (f"{each / seen.prompts:.1%}" for each in (seen.candidate, seen.aligned))
            of = f"of {seen.prompts} harmful requests"
            report(Event(stage, done, total, f"complies with {candidate} {of}, aligned {aligned}{said}"))

        found = examiner.look(mu, self.meter.openings, lambda seen: tell(seen, " so far", seen.prompts))
        tell(found.attack_success, ": accepted" if found.accepted else ": not accepted", total)
        return found


def open_with_examiner(
    trial: Trial, rule: Rule, requests: Requests, report: Progress
) -> tuple[CandidateModel, Examiner]:
    """Load the aligned model, and ask it what candidates will be asked, unless its answers are known.

    Args:
        trial: the layers.
        rule: says what is acceptable.
        requests: what is asked.
        report: told where the aligned model's answers cannot be kept for the next run.

    Raises:
        DeltaguardError: there are too few requests, or as `CandidateModel.open` and `Examiner.of`.
    """
    rule.require(len(requests.harmful), len(requests.harmless))
    identity, config = trial.job.aligned_identity, trial.config
    made_with = how_asked(config.device, config.whole_tokens)
    answers = kept_answers(identity, requests, made_with)
    candidate = CandidateModel.open(trial, requests=requests.all if answers is None else ())
    if answers is None:
        answers = tuple(candidate.meter.aligned_openings)
        try:
            keep_answers(identity, requests, made_with, answers)
        except DeltaguardError as error:
            report(Event("look", 0, 1, f"the aligned model's answers are not kept: {error}"))
    judge = config.judge.make(device=str(find_device(config.device)), folder=cache_folder())
    tells_refusals = config.judge.tells_refusals
    return candidate, Examiner.of(rule, requests, judge, answers, tells_refusals=tells_refusals)


def _not_finite(source: WeightSource) -> list[str]:
    """Say what is wrong with each tensor that holds NaN or infinite entries."""
    bad = {name: int((~source.read(name).isfinite()).sum()) for name in source.tensors}
    return [f"tensor `{name}` holds {n} entries that are NaN or infinite" for name, n in bad.items() if n]
