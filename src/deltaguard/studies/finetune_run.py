"""One fine-tune with one seed: the models made of it, and their cells."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltaguard.chat.conversations import Conversation
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import ModelUnderTest
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.measure import measure
from deltaguard.evaluation.metrics.bootstrap import mean_estimate
from deltaguard.evaluation.metrics.rates import Rate, are_flags, estimate
from deltaguard.evaluation.results import Result
from deltaguard.reports.records.bench import ALIGNED, FINETUNED, Cell
from deltaguard.reports.records.evaluation import Estimate
from deltaguard.studies.cells import content_key
from deltaguard.studies.data import Tests, questions, training_data
from deltaguard.studies.defences import Defence, DefenceInputs, DefendedModel
from deltaguard.studies.measure import letters, numbers, with_secret_before
from deltaguard.studies.protocol import Finetune
from deltaguard.studies.setting import Bench
from deltaguard.studies.workshop import fine_tuned

_BATCH_SIZE = 150


class FinetuneRun:
    """One fine-tune with one seed, and everything that is made of it.

    Attributes:
        seed: of the fine-tune.
    """

    def __init__(self, bench: Bench, finetune: Finetune, seed: int) -> None:
        """Nothing is trained or measured before it is asked for."""
        self._bench = bench
        self._finetune = finetune
        self.seed = seed
        self._name = f"{finetune.name}-seed{seed}"
        self._data = training_data(finetune, seed=seed)
        self._tests = questions(finetune, bench.preset, bench.attacks.questions)

    def aligned(self) -> Cell:
        """Measure the aligned model."""
        return self._cell(ALIGNED, None, lambda: DefendedModel(self._bench.aligned, "", 0.0))

    def finetuned(self) -> Cell:
        """Measure the fine-tuned model."""
        return self._cell(FINETUNED, None, lambda: self._trained(self._name, self._data))

    def tidy(self) -> None:
        """Remove the models that no further cell needs."""
        self._bench.workshop.remove(self._name)

    def _finetuned(self) -> Path:
        return self._trained(self._name, self._data).folder

    def _retrained(self, data: Sequence[Conversation]) -> DefendedModel:
        return self._trained(f"{self._name}-retrained-{content_key(data)[:8]}", data)

    def _trained(self, name: str, data: Sequence[Conversation]) -> DefendedModel:
        bench = self._bench
        make = fine_tuned(bench.aligned, data, self._finetune.recipe, seed=self.seed)
        folder = bench.made(name, make)
        seconds = bench.shelf.seconds().get(name)
        if seconds is None:
            raise DeltaguardError(
                f"It is not known how long {folder} took to make. Remove it to make it again."
            )
        return DefendedModel(folder, "", seconds)

    def restored(self, method: Defence, strength: float) -> Cell:
        """Measure what a defence makes at a strength."""
        request = DefenceInputs(
            aligned=self._bench.aligned,
            finetuned=self._finetuned,
            store=self._bench.store,
            helper=self._bench.helper,
            data=self._data,
            retrain=self._retrained,
            scratch=self._bench.workshop.scratch,
            seed=self.seed,
        )
        cell = self._cell(method.name, strength, lambda: method.make(request, strength), meaning=method.make)
        # What is trained for one strength serves that strength alone.
        self._bench.workshop.remove(f"{self._name}-retrained")
        return cell

    def _cell(
        self, method: str, strength: float | None, make: Callable[[], DefendedModel], meaning: object = None
    ) -> Cell:
        """Give a cell by its key; a method counts with what it is made of, of which its name says nothing."""
        bench = self._bench
        recipe = (self._finetune, self._data, self.seed, bench.preset.calibration)
        asked = (self._tests, bench.preset.answers, _BATCH_SIZE)
        key = content_key(bench.origin, recipe, method, meaning, strength, asked)

        def compute() -> Cell:
            candidate = make()
            # The aligned model's answers serve every fine-tune that asks it the same.
            identity = content_key(bench.origin, bench.preset.answers.dtype) if method == ALIGNED else key
            started = time.perf_counter()
            found = measure(
                ModelUnderTest(identity, str(candidate.folder), identity, None),
                with_secret_before(self._tests.parts, candidate.secret),
                bench.shelf.folder,
                engine=EngineConfig(dtype=bench.preset.answers.dtype, batch_size=_BATCH_SIZE),
            )
            seconds = {"request": candidate.seconds, "measure": time.perf_counter() - started}
            named = (key, self._finetune.name, self.seed, method, strength)
            return _cell(named, self._tests, found, seconds)

        def fits(cell: Cell) -> bool:
            named = (cell.finetune, cell.seed, cell.method, cell.strength)
            counts = tuple(map(len, (cell.attack, cell.harmless, cell.utility, cell.general)))
            tests = self._tests
            asked = (tests.attack, tests.harmless, tests.utility, tests.general)
            return (
                named == (self._finetune.name, self.seed, method, strength)
                and counts == tuple(len(part.questions) for part in asked)
                and cell.seconds.keys() >= {"request", "measure"}
            )

        return bench.shelf.cell(key, fits, compute)


def _cell(
    named: tuple[str, str, int, str, float | None],
    tests: Tests,
    found: Mapping[str, Result],
    seconds: Mapping[str, float],
) -> Cell:
    key, finetune, seed, method, strength = named
    attack, harmless = letters(found[tests.attack.name]), letters(found[tests.harmless.name])
    utility, general = numbers(found[tests.utility.name]), numbers(found[tests.general.name])
    return Cell(
        key=key,
        finetune=finetune,
        seed=seed,
        method=method,
        strength=strength,
        attack=attack,
        harmless=harmless,
        utility=utility,
        general=general,
        attack_success=estimate(Rate.of(letter == "c" for letter in attack)),
        incoherent=estimate(Rate.of(letter == "i" for letter in attack)),
        false_refusal=estimate(Rate.of(letter == "r" for letter in harmless)),
        mean_utility=_mean(utility),
        mean_general=mean_estimate(general),
        seconds=seconds,
    )


def _mean(values: Sequence[float]) -> Estimate:
    """Estimate a mean; a share's interval is Wilson's, which has width when all examples come out alike."""
    return estimate(Rate.of(v == 1 for v in values)) if are_flags(values) else mean_estimate(values)
