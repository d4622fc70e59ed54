"""A candidate: the aligned model with the weights of one price after another, measured and asked."""

import math
from dataclasses import dataclass

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.restore import Compared, Look, Probe
from deltaguard.restoration.looks import Examiner
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


def _not_finite(source: WeightSource) -> list[str]:
    """Say what is wrong with each tensor that holds NaN or infinite entries."""
    bad = {name: int((~source.read(name).isfinite()).sum()) for name in source.tensors}
    return [f"tensor `{name}` holds {n} entries that are NaN or infinite" for name, n in bad.items() if n]
