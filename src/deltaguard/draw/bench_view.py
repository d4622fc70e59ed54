"""What the tables and plots of a bench pick from its report."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from deltaguard.report.bench import ALIGNED, BenchReport, Cell, CurvePoint, FinetuneRow, Score
from deltaguard.report.evaluation import Estimate

OFTEN = ("request", "measure", "total")
"""Times of a report that are no single model's."""


def bench_methods(report: BenchReport) -> tuple[str, ...]:
    """All methods, in the order in which the curves first name them; their place decides their colour."""
    return tuple(dict.fromkeys(point.method for point in report.curves))


def scores_of(report: BenchReport, finetune: FinetuneRow) -> tuple[Score, ...]:
    """The scores on one fine-tune, in the report's order."""
    return tuple(score for score in report.scores if score.finetune == finetune.name)


def points_of(report: BenchReport, finetune: FinetuneRow) -> tuple[CurvePoint, ...]:
    """The points of all curves on one fine-tune, in the report's order."""
    return tuple(point for point in report.curves if point.finetune == finetune.name)


def height(report: BenchReport, finetune: FinetuneRow, point: CurvePoint) -> float | None:
    """Where a point stands in the panel of its fine-tune.

    Args:
        report: of a finished bench.
        finetune: the point's.
        point: of a curve.

    Returns:
        The share of the utility gain kept; where a fine-tune has no gain to keep, what the point costs in
        general. None where there is no such number, so that the point cannot be drawn.
    """
    if not finetune.gains:
        return general_change(report, point)
    return point.kept.value if point.kept else None


def undrawn(report: BenchReport, finetune: FinetuneRow) -> int:
    """How many points of a fine-tune have no height."""
    return sum(height(report, finetune, point) is None for point in points_of(report, finetune))


def general_change(report: BenchReport, point: CurvePoint) -> float | None:
    """The rise of the mean negative log-likelihood of answers to general questions over the aligned model's.

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


def reference_rate(
    report: BenchReport, finetune: FinetuneRow, method: str, rate: Callable[[Cell], Estimate]
) -> float | None:
    """A rate of `aligned` or `finetuned`, mean over the seeds; None where it was not measured."""
    values = [rate(cell).value for cell in _cells(report, finetune.name, method, None)]
    return mean(values) if values else None


def preparation(report: BenchReport) -> Mapping[str, float]:
    """How long everything took that an aligned model needs once, whatever is fine-tuned from it.

    Args:
        report: of a finished bench.

    Returns:
        Seconds by what was made: the store of curvature, models that methods take as helpers. The fine-tunes
        themselves and models trained anew for a request are left out.
    """
    finetunes = tuple(f"{row.name}-" for row in report.finetunes)
    return {
        name: seconds
        for name, seconds in report.seconds.items()
        if name not in OFTEN and not f"{name}-".startswith(finetunes)
    }


def _cells(report: BenchReport, finetune: str, method: str, strength: float | None) -> Sequence[Cell]:
    wanted = (finetune, method, strength)
    return [cell for cell in report.cells if (cell.finetune, cell.method, cell.strength) == wanted]
