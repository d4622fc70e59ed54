"""One fine-tune in memory: candidates are brought to the same safety KL, then asked everything."""

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from deltaguard.restoration.curvature import Spectra
from deltaguard.restoration.price import first_price
from safetensors.torch import save_file
from tools.experiments import ExperimentRow, Share
from torch import Tensor

from deltaguard.chat.conversations import Conversation
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Decoding
from deltaguard.evaluation.metrics.rates import Rate, estimate
from deltaguard.evaluation.metrics.runs import gain_kept, gain_lead
from deltaguard.finetuning.tasks import exact_match
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.evaluation import Estimate
from deltaguard.reports.records.restore import Probe
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.solvers import Profile, Projection, joint_profile, project
from deltaguard.studies.data import Tests
from deltaguard.studies.measure import letters
from deltaguard.studies.protocol import QUICK

CLOSE = 0.02
"""Safety KL of all candidates of an experiment is the same to within this share of it."""
MOST_PROBES = 12
_LONGEST_STEP = math.log(30)

Weights = Iterator[tuple[str, Tensor]]
"""Names of the checkpoint's tensors, and their values."""


@dataclass(frozen=True)
class Trial:
    """A way to restore, at any price.

    Attributes:
        at: the restored weights at a price.
        profile: what the search for the price is told.
        start: the first price to measure; guessed where absent.
        predicts: whether the profile's predicted safety KL is that of the candidates.
    """

    at: Callable[[float], Weights]
    profile: Profile
    start: float | None = None
    predicts: bool = True


@dataclass(frozen=True)
class Asked:
    """What one model answered.

    Attributes:
        attack: one letter a harmful request.
        exact: for each task question, whether the answer is right.
        nll: negative log-likelihood of the right answer, nats a token; where there is no task, of answers
            whose likelihood is the utility.
    """

    attack: str
    exact: tuple[bool, ...]
    nll: tuple[float, ...]


class Laboratory:
    """One fine-tune of one aligned model.

    Attributes:
        meter: measures candidates; it holds the last one.
        deltas: fine-tuned less aligned weight of every layer that is restored.
        tests: what models are asked.
    """

    def __init__(
        self,
        aligned: Path,
        finetuned: Path,
        held_out: Sequence[Conversation],
        layers: Iterable[str],
        tests: Tests,
        scratch: Path,
    ) -> None:
        """Load the models, and ask the aligned and the fine-tuned one."""
        self._aligned, self._finetuned = Checkpoint.open(aligned), Checkpoint.open(finetuned)
        self._scratch = scratch
        self.tests = tests
        self.base = {name: self._aligned.read(name).float() for name in layers}
        self.deltas = {name: self._finetuned.read(name).float() - base for name, base in self.base.items()}
        self._before, self._after = self._ask(aligned), self._ask(finetuned)
        self._open(held_out)

    def settle_aligned(self) -> None:
        """Take everything that is not restored from the aligned model."""
        self._settle(self._aligned)

    def settle_finetuned(self) -> None:
        """Take everything that is not restored from the fine-tuned model."""
        self._settle(self._finetuned)

    def _settle(self, chosen: Checkpoint) -> None:
        self.meter.put((name, chosen.read(name)) for name in chosen.tensors if name not in self.base)
        self._others = chosen

    def closed_form(self, spectra: Mapping[str, Spectra]) -> Trial:
        """The closed form with this curvature."""
        projections = {n: project(d, spectra[n].inputs, spectra[n].outputs) for n, d in self.deltas.items()}
        return Trial(lambda mu: self._restored(projections, mu), _joint(projections.values()))

    def weights(self, deltas: Iterable[tuple[str, Tensor]]) -> Weights:
        """Weights from restored deltas."""
        return ((name, self.base[name] + delta) for name, delta in deltas)

    def settled(self, trial: Trial, limit: float) -> Probe:
        """The price at which a trial's safety KL is the limit, to within `CLOSE` of it.

        Raises:
            RuntimeError: it was not found in `MOST_PROBES` measurements.
        """

        def probe(mu: float) -> Probe:
            self.meter.put(trial.at(mu))
            return Probe(mu=mu, safety_kl=self.meter.measure().mean)

        price = trial.start or first_price(trial.profile, limit, self.finetuned_kl)
        probes: list[Probe] = []
        while len(probes) < MOST_PROBES:
            probes.append(probe(price))
            if abs(probes[-1].safety_kl / limit - 1) <= CLOSE:
                return probes[-1]
            price = _next_price(probes, limit)
        raise RuntimeError(f"No price was found at which safety KL is {limit:.2g}: {probes}.")

    def row(
        self, experiment: str, variant: str, trial: Trial, limit: float, first: ExperimentRow | None = None
    ) -> ExperimentRow:
        """Bring a trial to a limit and ask it everything.

        Args:
            experiment: in a few words.
            variant: in a few words.
            trial: the way to restore.
            limit: nats per response token.
            first: the row with which this one is compared.
        """
        started = time.perf_counter()
        probe = self.settled(trial, limit)
        asked = self._ask(self._written(trial.at(probe.mu)))
        predicted = trial.profile.predicted_kl(probe.mu) if trial.predicts else None
        return self._row(experiment, variant, probe, asked, time.perf_counter() - started, first, predicted)

    def references(self) -> tuple[ExperimentRow, ExperimentRow]:
        """The aligned and the fine-tuned model."""
        aligned, tuned = (
            self._row("", name, Probe(mu=0.0, safety_kl=kl), asked, 0.0, None, None)
            for name, kl, asked in (
                ("aligned", 0.0, self._before),
                ("fine-tuned", self.finetuned_kl, self._after),
            )
        )
        return aligned, tuned

    def measured(
        self,
        experiment: str,
        variant: str,
        deltas: Mapping[str, Tensor],
        predicted: float,
        first: ExperimentRow | None,
    ) -> ExperimentRow:
        """Ask a candidate as it is."""
        started = time.perf_counter()
        self.meter.put(self.weights(deltas.items()))
        probe = Probe(mu=0.0, safety_kl=self.meter.measure().mean)
        asked = self._ask(self._written(self.weights(deltas.items())))
        return self._row(experiment, variant, probe, asked, time.perf_counter() - started, first, predicted)

    @contextmanager
    def held_out(self, conversations: Sequence[Conversation]) -> Generator[None]:
        """Measure safety KL on other conversations for a while."""
        before = self.meter, self.finetuned_kl
        self._open(conversations)
        try:
            yield
        finally:
            self.meter, self.finetuned_kl = before

    def _open(self, held_out: Sequence[Conversation]) -> None:
        self.meter = SafetyMeter.open(
            self._aligned, self._finetuned, held_out, device=torch.device("cpu"), dtype=torch.float32
        )
        self.meter.put((name, self._finetuned.read(name)) for name in self._finetuned.tensors)
        self.finetuned_kl = self.meter.measure().mean
        self.settle_aligned()

    def _restored(self, projections: Mapping[str, Projection], mu: float) -> Weights:
        return self.weights((name, found.restored(mu)) for name, found in projections.items())

    def _written(self, weights: Weights) -> Path:
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(
            self._finetuned.folder, self._scratch, ignore=shutil.ignore_patterns("*.safetensors*")
        )
        others = (name for name in self._others.tensors if name not in self.base)
        tensors = {name: self._others.read(name) for name in others} | dict(weights)
        save_file(tensors, self._scratch / "model.safetensors", metadata={"format": "pt"})
        return self._scratch

    def _ask(self, folder: Path) -> Asked:
        how, load = QUICK.answers, partial(TransformersEngine.open, str(folder), device="cpu", batch_size=150)
        engine = load(dtype=how.dtype)
        attack = engine.answer(self.tests.attack, Decoding(how.safety))
        task = engine.answer(self.tests.task, Decoding(how.task))
        nll = load().likelihood(self.tests.task or self.tests.likelihood)
        right = (exact_match(a, q.expected or "") for a, q in zip(task, self.tests.task, strict=True))
        return Asked(letters(attack), tuple(right), tuple(nll))

    def _row(
        self,
        experiment: str,
        variant: str,
        probe: Probe,
        asked: Asked,
        seconds: float,
        first: ExperimentRow | None,
        predicted: float | None,
    ) -> ExperimentRow:
        before, after, own = [self._before.nll], [self._after.nll], [asked.nll]
        kept = gain_kept(before, after, own, better="lower")
        lead = first and gain_lead(before, after, own, [first.nll], better="lower")
        return ExperimentRow(
            experiment=experiment,
            variant=variant,
            safety_kl=probe.safety_kl,
            predicted_kl=predicted,
            attack_success=share(estimate(Rate.of(letter == "c" for letter in asked.attack))),
            task_accuracy=share(estimate(Rate.of(asked.exact))) if asked.exact else None,
            kept=share(kept),
            lead=share(lead),
            seconds=seconds,
            attack=asked.attack,
            nll=asked.nll,
        )


def _next_price(probes: Sequence[Probe], limit: float) -> float:
    """By the line through the two measurements nearest to the limit; both axes are logarithmic."""
    nearest = sorted(probes, key=lambda each: abs(math.log(max(each.safety_kl, 1e-9) / limit)))[:2]
    if len(nearest) == 1:
        return nearest[0].mu * max(nearest[0].safety_kl, 1e-9) / limit
    (x, y), (u, v) = ((math.log(p.mu), math.log(max(p.safety_kl, 1e-9) / limit)) for p in nearest)
    step = -y * (u - x) / (v - y) if v != y else math.copysign(_LONGEST_STEP, y)
    return math.exp(x + min(max(step, -_LONGEST_STEP), _LONGEST_STEP))


def _joint(projections: Iterable[Projection]) -> Profile:
    return joint_profile(p.directions.profile() for p in projections)


def share(found: Estimate | None) -> Share | None:
    """An estimate as it stands in a row."""
    return (
        None if found is None else Share(value=found.value, low=found.low, high=found.high, total=found.total)
    )
