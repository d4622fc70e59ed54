"""A candidate: the aligned model with the weights of one price after another, measured and asked."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from deltaguard.chat.conversations import Conversation
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.dial import Compared, Look, Probe
from deltaguard.restoration.divergence import SafetyKL
from deltaguard.restoration.looks import Examiner
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.trial import Trial


@dataclass
class Candidate(ABC):
    """The aligned model with the weights of one price after another, however much of it is in memory.

    Attributes:
        trial: the layers.
        conversations: how many were held out.
        tokens: response tokens in them, that safety KL is the mean over.
        at_once: how many prices are measured in the time of one, about.
        by_blocks: whether one decoder block at a time is in memory.
        aligned_likelihood: the aligned model's, of tasks that were asked for; None without any.
        aligned_openings: the beginnings of its answers to requests that were.
        measured: how many candidates so far.
        looked: how many were asked.
        seconds: that measuring and asking took so far.
    """

    trial: Trial
    conversations: int
    tokens: int
    at_once: int = 1
    by_blocks: bool = False
    aligned_likelihood: float | None = None
    aligned_openings: Sequence[str] = ()
    measured: int = 0
    looked: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def whole(self, report: Progress, *, enough: float = math.inf) -> Probe:
        """Measure the fine-tuned model as it is, with all its tensors.

        Args:
            report: told of the measurement.
            enough: as in `SafetyMeter.measure`.

        Raises:
            DeltaguardError: its predictions are not finite; the tensors that are not are listed.
        """
        try:
            with self._timed("measure"):
                found = self._measure_whole(report, enough)
        except DeltaguardError as error:
            finetuned = self.trial.job.finetuned
            if problems := _not_finite(finetuned):
                raise DeltaguardError(listed(f"{finetuned.reference} cannot be run", problems)) from error
            raise
        return self._told(0.0, found, report)

    def probe(self, mu: float, report: Progress, *, enough: float = math.inf) -> Probe:
        """Measure the candidate of one price; `enough` is as in `SafetyMeter.measure`."""
        (found,) = self.probes([mu], report, enough=enough)
        return found

    def probes(self, prices: Sequence[float], report: Progress, *, enough: float = math.inf) -> list[Probe]:
        """Measure the candidates of several prices; the weights of the last stay put.

        Args:
            prices: any number; `at_once` of them take about the time of one.
            report: told of each.
            enough: as in `SafetyMeter.measure`.
        """
        found: list[Probe] = []
        for start in range(0, len(prices), self.at_once):
            part = prices[start : start + self.at_once]
            with self._timed("measure"):
                measured = self._measure(part, report, enough)
            found += [self._told(mu, each, report) for mu, each in zip(part, measured, strict=True)]
        return found

    def look(self, mu: float, examiner: Examiner, report: Progress, *, most: int, both: bool = False) -> Look:
        """Ask the candidate whose weights were put last for the beginnings of its answers.

        Args:
            mu: its price.
            examiner: asks and judges.
            report: told what is seen, one stage a candidate.
            most: looks at most, for the report.
            both: as in `Examiner.look`.
        """
        self.looked += 1
        stage, total = f"look {self.looked} of at most {most}", len(examiner.requests.all)

        def tell(seen: Compared, said: str, done: int) -> None:
            report(Event(stage, done, total, f"complies with {_rates(seen, 'harmful')}{said}"))

        so_far = lambda seen: tell(seen, " so far", seen.prompts)
        with self._timed("ask"):
            found = examiner.look(mu, self.openings, so_far, both=both)
        refused = found.false_refusals
        refuses = "" if refused is None else f"; refuses {_rates(refused, 'harmless')}"
        tell(found.attack_success, f"{refuses}: {'accepted' if found.accepted else 'not accepted'}", total)
        return found

    @abstractmethod
    def take_others(self) -> None:
        """Take the tensors that no method decides from where the plan takes them."""

    @abstractmethod
    def put(self, mu: float) -> None:
        """Take on the layers of one price."""

    @abstractmethod
    def likelihood(self, tasks: Sequence[Conversation]) -> float:
        """Measure the likelihood of tasks with the weights put last, see `SafetyMeter.likelihood`."""

    @abstractmethod
    def openings(self, requests: Sequence[Conversation]) -> list[str]:
        """Let the candidate whose weights were put last begin its answers, see `chat.openings`."""

    @abstractmethod
    def _measure_whole(self, report: Progress, enough: float) -> SafetyKL:
        """Take on all tensors of the fine-tuned model, and measure it."""

    @abstractmethod
    def _measure(self, prices: Sequence[float], report: Progress, enough: float) -> list[SafetyKL]:
        """Take on the layers of `at_once` prices at most, and measure each."""

    @contextmanager
    def _timed(self, what: Literal["measure", "ask"]) -> Generator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def _told(self, mu: float, found: SafetyKL, report: Progress) -> Probe:
        self.measured += 1
        said = f"safety KL {found.mean:.2g} at price {mu:.3g}"
        report(Event("measure", self.measured, self.measured, said))
        return Probe(mu=mu, safety_kl=found.mean, margin=found.margin, conversations=found.conversations)


@dataclass
class CandidateModel(Candidate):
    """A model in memory that takes on the weights of one price after another.

    Attributes:
        meter: holds it, and measures its safety KL.
    """

    meter: SafetyMeter = field(kw_only=True)

    @classmethod
    def of(cls, trial: Trial, meter: SafetyMeter, conversations: int) -> "CandidateModel":
        """Take the model of a meter.

        Args:
            trial: the layers.
            meter: holds the aligned model.
            conversations: how many were held out.
        """
        return cls(
            trial,
            conversations,
            meter.tokens,
            aligned_likelihood=meter.aligned_likelihood,
            aligned_openings=meter.aligned_openings,
            meter=meter,
        )

    def take_others(self) -> None:
        """Take the tensors that no method decides from where the plan takes them."""
        self.meter.put(self.trial.others())

    def put(self, mu: float) -> None:
        """Take on the layers of one price."""
        self.meter.put(self.trial.weights(mu))

    def likelihood(self, tasks: Sequence[Conversation]) -> float:
        """Measure the likelihood of tasks, see `SafetyMeter.likelihood`."""
        return self.meter.likelihood(tasks)

    def openings(self, requests: Sequence[Conversation]) -> list[str]:
        """Let the candidate begin its answers, see `chat.openings`."""
        return self.meter.openings(requests)

    def _measure_whole(self, report: Progress, enough: float) -> SafetyKL:  # noqa: ARG002
        trial = self.trial
        self.meter.put((name, trial.finetuned_tensor(name)) for name in trial.job.finetuned.tensors)
        return self.meter.measure(enough=enough)

    def _measure(self, prices: Sequence[float], report: Progress, enough: float) -> list[SafetyKL]:  # noqa: ARG002
        (mu,) = prices
        self.put(mu)
        return [self.meter.measure(enough=enough)]


def _rates(seen: Compared, kind: str) -> str:
    candidate, aligned = (f"{each / seen.prompts:.1%}" for each in (seen.candidate, seen.aligned))
    return f"{candidate} of {seen.prompts} {kind} requests, aligned {aligned}"


def _not_finite(source: WeightSource) -> list[str]:
    """Say what is wrong with each tensor that holds NaN or infinite entries."""
    bad = {name: int((~source.read(name).isfinite()).sum()) for name in source.tensors}
    return [f"tensor `{name}` holds {n} entries that are NaN or infinite" for name, n in bad.items() if n]
