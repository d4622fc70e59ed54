"""One fine-tune with one seed: the models made of it, and their cells."""

import time
from collections.abc import Callable

from deltaguard.evaluation.asking import ModelUnderTest
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.measure import measure
from deltaguard.evaluation.metrics.bootstrap import mean_estimate
from deltaguard.evaluation.metrics.rates import Rate, are_flags, estimate
from deltaguard.evaluation.results import Result
from deltaguard.reports.records.bench import ALIGNED, FINETUNED, Cell
from deltaguard.studies.cells import content_key
from deltaguard.studies.data import questions
from deltaguard.studies.defences import Defence, DefendedModel
from deltaguard.studies.finetune_models import FinetuneModels
from deltaguard.studies.mixing import with_secret_before
from deltaguard.studies.protocol import Finetune
from deltaguard.studies.setting import Bench

BATCH_SIZE = 150


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
        self._models = FinetuneModels(bench, finetune, seed)
        self._tests = questions(finetune, bench.preset, bench.attacks.questions)

    def aligned(self) -> Cell:
        """Measure the aligned model."""
        return self._cell(ALIGNED, None, lambda: DefendedModel(self._bench.aligned, 0.0))

    def finetuned(self) -> Cell:
        """Measure the fine-tuned model."""
        return self._cell(FINETUNED, None, self._models.finetuned)

    def tidy(self) -> None:
        """Remove the models that no further cell needs."""
        self._models.tidy()

    def restored(self, method: Defence, strength: float) -> Cell:
        """Measure what a defence makes at a strength."""
        inputs = self._models.inputs()
        cell = self._cell(method.name, strength, lambda: method.make(inputs, strength), meaning=method.make)
        self._models.remove_retrained()
        return cell

    def _cell(
        self, method: str, strength: float | None, make: Callable[[], DefendedModel], meaning: object = None
    ) -> Cell:
        """Give a cell by its key; a method counts with what it is made of, of which its name says nothing."""
        bench = self._bench
        recipe = (self._finetune, self._models.data, self.seed, bench.preset.calibration)
        asked = (self._tests, bench.preset.answers, BATCH_SIZE)
        key = content_key(bench.origin, recipe, method, meaning, strength, asked)

        tests = self._tests

        def fits(cell: Cell) -> bool:
            named = (cell.finetune, cell.seed, cell.method, cell.strength)
            found = (cell.attack, cell.harmless, cell.utility, cell.general)
            parts = (tests.attack, tests.harmless, tests.utility, tests.general)
            return (
                named == (self._finetune.name, self.seed, method, strength)
                and [len(each) for each in found] == [len(part.questions) for part in parts]
                and cell.seconds.keys() >= {"request", "measure"}
            )

        return bench.shelf.cell(key, Cell, fits, lambda: self._measured(key, method, strength, make()))

    def _measured(self, key: str, method: str, strength: float | None, model: DefendedModel) -> Cell:
        bench, tests = self._bench, self._tests
        # The aligned model's answers serve every fine-tune that asks it the same.
        identity = content_key(bench.origin, bench.dtype) if method == ALIGNED else key
        started = time.perf_counter()
        found = measure(
            ModelUnderTest(identity, str(model.folder), identity, None),
            with_secret_before(tests.parts, model.secret),
            bench.shelf.folder,
            engine=EngineConfig(dtype=bench.dtype, batch_size=BATCH_SIZE),
        )
        seconds = {"request": model.seconds, "measure": time.perf_counter() - started}
        attack, harmless = (letters(found[part.name]) for part in (tests.attack, tests.harmless))
        utility, general = (numbers(found[part.name]) for part in (tests.utility, tests.general))
        right = Rate.of(value == 1 for value in utility)
        return Cell(
            key=key,
            finetune=self._finetune.name,
            seed=self.seed,
            method=method,
            strength=strength,
            attack=attack,
            harmless=harmless,
            utility=utility,
            general=general,
            attack_success=estimate(Rate.of(letter == "c" for letter in attack)),
            incoherent=estimate(Rate.of(letter == "i" for letter in attack)),
            false_refusal=estimate(Rate.of(letter == "r" for letter in harmless)),
            # Wilson's interval of a share has width when all examples come out alike.
            mean_utility=estimate(right) if are_flags(utility) else mean_estimate(utility),
            mean_general=mean_estimate(general),
            seconds=seconds,
        )


def letters(result: Result) -> str:
    """Write the class of each answer as its first letter: refused, complied or incoherent."""
    return "".join(str(each)[0] for each in result.judged["opening"].classes)


def numbers(result: Result) -> tuple[float, ...]:
    """List the one number that a part without judges measures on each question."""
    (values,) = result.values.values()
    return tuple(value for value in values if value is not None)
