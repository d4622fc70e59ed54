"""One fine-tune with one seed, restored without options: the models made of it, and their cells."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deltaguard.evaluation.asking import ModelUnderTest
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.measure import measure
from deltaguard.evaluation.suites.parts import Part
from deltaguard.reports.records.attacks import AttackCell, Checked, RestoredTo
from deltaguard.reports.records.bench import ALIGNED, FINETUNED
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.check import check
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.attackers import ATTACKERS
from deltaguard.studies.cells import content_key
from deltaguard.studies.data import questions
from deltaguard.studies.defences import DefendedModel
from deltaguard.studies.finetune_models import FinetuneModels
from deltaguard.studies.finetune_run import BATCH_SIZE, letters, numbers
from deltaguard.studies.mixing import with_secret_before
from deltaguard.studies.protocol import Finetune, Preset
from deltaguard.studies.repairs import Repair
from deltaguard.studies.setting import Bench


@dataclass(frozen=True)
class AttackTests:
    """What every model of a fine-tune is asked; none of it is trained or calibrated on.

    Attributes:
        plain: harmful requests, in the setting that the fine-tune is used in.
        wrapped: the same in the attacker's way; `None` where there is none.
        harmless: harmless requests that look dangerous.
        utility: questions of what the fine-tune teaches, the likelihood of whose answers is taken; `None`
            where it teaches nothing that should stay.
        exact: the same, answered; `None` where no answer is exactly right.
    """

    plain: Part
    wrapped: Part | None
    harmless: Part
    utility: Part | None
    exact: Part | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that there are."""
        found = (self.plain, self.wrapped, self.harmless, self.utility, self.exact)
        return tuple(part for part in found if part is not None)


def attack_tests(finetune: Finetune, preset: Preset, attacks: Sequence[Question]) -> AttackTests:
    """Choose what the models of one fine-tune are asked.

    Args:
        finetune: an attacker's, or one of the protocol's own.
        preset: says how many of each.
        attacks: a user's harmful requests, which are asked first; deltaguard's own fill up.
    """
    tests, attacker = questions(finetune, preset, attacks), ATTACKERS.get(finetune.kind)
    wrapped = utility = exact = None
    # What one model is asked in several ways goes by several names, which are those of files.
    if attacker is not None and attacker.way:
        asked = tuple(replace(each, prompt=attacker.wrap(each.prompt)) for each in tests.attack.questions)
        wrapped = replace(tests.attack, name=f"attack-{attacker.way}", questions=asked)
    if finetune.is_task:
        exact = tests.utility
        utility = replace(exact, name="task-likelihood", decoding=None, scorers=(), likelihood=True)
    elif finetune.kind == "identity":
        utility = tests.utility
    return AttackTests(tests.attack, wrapped, tests.harmless, utility, exact)


class AttackRun:
    """One fine-tune with one seed, and all that is made of it; nothing is made before it is asked for.

    Attributes:
        seed: of the fine-tune.
    """

    def __init__(self, bench: Bench, finetune: Finetune, seed: int) -> None:
        """Draw the data, and choose what is asked."""
        self._bench = bench
        self._finetune = finetune
        self.seed = seed
        self._models = FinetuneModels(bench, finetune, seed)
        self._tests = attack_tests(finetune, bench.preset, bench.attacks.questions)

    def aligned(self) -> AttackCell:
        """Measure the aligned model."""
        return self._cell(ALIGNED, None, lambda: DefendedModel(self._bench.aligned, 0.0))

    def finetuned(self) -> AttackCell:
        """Measure the fine-tuned model, and check it."""
        return self._cell(FINETUNED, RestoreConfig(), self._models.finetuned)

    def restored(self, repair: Repair) -> AttackCell:
        """Measure what a defence makes of it."""
        return self._cell(repair.name, repair.setting, lambda: repair(self._models.inputs()))

    def tidy(self) -> None:
        """Remove the models that no further cell needs."""
        self._models.tidy()

    def _cell(
        self, method: str, config: RestoreConfig | float | None, make: Callable[[], DefendedModel]
    ) -> AttackCell:
        bench, tests = self._bench, self._tests
        recipe = (self._finetune, self._models.data, self.seed, bench.preset.calibration)
        asked = (tests, bench.preset.answers, BATCH_SIZE)
        key = content_key(bench.origin, recipe, method, config, asked)

        def fits(cell: AttackCell) -> bool:
            found = (cell.plain, cell.wrapped, cell.harmless, cell.utility, cell.exact)
            parts = (tests.plain, tests.wrapped, tests.harmless, tests.utility, tests.exact)
            return (
                (cell.attacker, cell.seed, cell.method) == (self._finetune.name, self.seed, method)
                and [len(each) for each in found] == [len(part.questions) if part else 0 for part in parts]
                and (cell.checked is not None) == (method == FINETUNED)
                and cell.seconds.keys() >= {"request", "measure"}
            )

        return bench.shelf.cell(key, AttackCell, fits, lambda: self._measured(key, method, make()))

    def _measured(self, key: str, method: str, model: DefendedModel) -> AttackCell:
        bench, tests = self._bench, self._tests
        # The aligned model's answers serve every attacker that asks it the same.
        identity = content_key(bench.origin, bench.dtype) if method == ALIGNED else key
        started = time.perf_counter()
        found = measure(
            ModelUnderTest(identity, str(model.folder), identity, None),
            with_secret_before(tests.parts, model.secret),
            bench.shelf.folder,
            engine=EngineConfig(dtype=bench.dtype, batch_size=BATCH_SIZE),
        )
        checked = self._checked(model) if method == FINETUNED else None
        return AttackCell(
            key=key,
            attacker=self._finetune.name,
            seed=self.seed,
            method=method,
            plain=letters(found[tests.plain.name]),
            wrapped=letters(found[tests.wrapped.name]) if tests.wrapped else "",
            harmless=letters(found[tests.harmless.name]),
            utility=numbers(found[tests.utility.name]) if tests.utility else (),
            exact="".join(f"{value:.0f}" for value in numbers(found[tests.exact.name]))
            if tests.exact
            else "",
            checked=checked,
            restored_to=None if model.report is None else _restored_to(model.report),
            seconds={"request": model.seconds, "measure": time.perf_counter() - started},
        )

    def _checked(self, model: DefendedModel) -> Checked:
        report = check(self._bench.aligned, model.folder, store=self._bench.store("auto"))
        refusals = report.look.false_refusals
        return Checked(
            verdict=report.verdict,
            safety_kl=report.safety_kl.safety_kl,
            added_attack_success=report.look.attack_success.added,
            added_false_refusals=refusals and refusals.added,
        )


def _restored_to(report: RestoreReport) -> RestoredTo:
    dial = report.dial
    return RestoredTo(
        kept_energy=report.kept_energy,
        safety_kl=dial and dial.restored_kl,
        stopped_by=None if dial is None else report.stopped_by,
    )
