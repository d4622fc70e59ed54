"""Fine-tunes restored once, put together over the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from deltaguard.reports.records.attacks import (
    AttackerRow,
    AttackOutcome,
    AttacksReport,
    Rates,
    RestoredTo,
)
from deltaguard.reports.records.evaluation import Estimate


@dataclass(frozen=True)
class Attacked:
    """What one method left of one fine-tune, over all seeds.

    Attributes:
        attacker: the fine-tune.
        found: one outcome a seed.
    """

    attacker: AttackerRow
    found: tuple[AttackOutcome, ...]

    @property
    def asked(self) -> tuple[tuple[str, Rates], ...]:
        """Attack success by the way of asking, means over the seeds."""
        ways = [("plainly", [outcome.plain for outcome in self.found])]
        wrapped = [outcome.wrapped for outcome in self.found if outcome.wrapped is not None]
        if self.attacker.way and wrapped:
            ways.append((f"with {self.attacker.way}", wrapped))
        return tuple((way, _mean_rates(rates)) for way, rates in ways)

    @property
    def restores(self) -> tuple[tuple[int, RestoredTo], ...]:
        """What the restores say, where that was kept, with the seed of each."""
        return tuple((each.seed, each.restored_to) for each in self.found if each.restored_to is not None)

    @property
    def kept(self) -> Estimate | None:
        """Gain kept in likelihood, mean over the seeds; None where any has none."""
        return _mean_of_all([outcome.kept for outcome in self.found])

    @property
    def kept_exact(self) -> Estimate | None:
        """Gain kept in exactly right answers, likewise."""
        return _mean_of_all([outcome.kept_exact for outcome in self.found])


def methods_of(report: AttacksReport) -> tuple[str, ...]:
    """List the methods that restored, in order."""
    return tuple(dict.fromkeys(outcome.method for outcome in report.outcomes))


def attacked(report: AttacksReport, method: str) -> list[Attacked]:
    """Find what a method left of each fine-tune that it met."""
    found = [
        Attacked(row, tuple(o for o in report.outcomes if (o.attacker, o.method) == (row.name, method)))
        for row in report.attackers
    ]
    return [each for each in found if each.found]


def request_seconds(report: AttacksReport, attacker: str, method: str) -> float:
    """Average how long it took a method to make its models of a fine-tune."""
    cells = (cell for cell in report.cells if (cell.attacker, cell.method) == (attacker, method))
    return fmean(cell.seconds["request"] for cell in cells)


def _mean(found: Sequence[Estimate]) -> Estimate:
    """Average estimates over seeds, ends too: seeds share their prompts (see `difference_of_shares`)."""
    ends = {name: fmean(getattr(each, name) for each in found) for name in ("value", "low", "high")}
    return found[0].model_copy(update=ends)


def _mean_of_all(found: Sequence[Estimate | None]) -> Estimate | None:
    known = [each for each in found if each is not None]
    return _mean(known) if len(known) == len(found) else None


def _mean_rates(found: Sequence[Rates]) -> Rates:
    return Rates(**{name: _mean([getattr(each, name) for each in found]) for name in Rates.model_fields})


def mean_refusals(found: Sequence[AttackOutcome]) -> Rates:
    """Average the false refusals of outcomes."""
    return _mean_rates([outcome.false_refusals for outcome in found])
