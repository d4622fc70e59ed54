"""What the tables and plots of a bench pick from its report."""

from collections.abc import Sequence
from statistics import mean

from deltaguard.report.bench import BenchReport, Cell, CurvePoint, FinetuneRow, Score

ALIGNED, FINETUNED = "aligned", "finetuned"
"""The names that cells give to the two models no method made."""


def bench_methods(report: BenchReport) -> tuple[str, ...]:
    """All methods, in the order in which the curves first name them; their place decides their colour."""
    return tuple(dict.fromkeys(point.method for point in report.curves))


def scores_of(report: BenchReport, finetune: FinetuneRow) -> tuple[Score, ...]:
    """The scores on one fine-tune, in the report's order."""
    return tuple(score for score in report.scores if score.finetune == finetune.name)


def points_of(report: BenchReport, finetune: FinetuneRow) -> tuple[CurvePoint, ...]:
    """The points of all curves on one fine-tune, in the report's order."""
    return tuple(point for point in report.curves if point.finetune == finetune.name)


def general_change(report: BenchReport, point: CurvePoint) -> float | None:
    """How much the mean negative log-likelihood of everyday answers rose over the aligned model's.

    Args:
        report: of a finished bench.
        point: of a curve.

    Returns:
        Nats a token, mean over the seeds that have both models; None where none has.
    """
    aligned = {cell.seed: cell for cell in _cells(report, point.finetune, ALIGNED, None)}
    changes = [
        cell.mean_general.value - aligned[cell.seed].mean_general.value
        for cell in _cells(report, point.finetune, point.method, point.strength)
        if cell.seed in aligned
    ]
    return mean(changes) if changes else None


def attack_success(report: BenchReport, finetune: FinetuneRow, method: str) -> float | None:
    """Attack success of `aligned` or `finetuned`, mean over the seeds; None where it was not measured."""
    values = [cell.attack_success.value for cell in _cells(report, finetune.name, method, None)]
    return mean(values) if values else None


def _cells(report: BenchReport, finetune: str, method: str, strength: float | None) -> Sequence[Cell]:
    wanted = (finetune, method, strength)
    return [cell for cell in report.cells if (cell.finetune, cell.method, cell.strength) == wanted]
