"""What the tables and plots of a bench pick from its report."""

from collections.abc import Callable, Mapping
from statistics import mean

from deltaguard.reports.records.bench import BenchReport, Cell, Contest, CurvePoint, FinetuneRow, Score
from deltaguard.reports.records.evaluation import Estimate

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


def contests_of(report: BenchReport, finetune: FinetuneRow) -> tuple[Contest, ...]:
    """The method that keeps most of one fine-tune's gain beside each other, in the report's order."""
    return tuple(contest for contest in report.contests if contest.finetune == finetune.name)


def height(finetune: FinetuneRow, point: CurvePoint) -> Estimate | None:
    """Where a point stands in the panel of its fine-tune, with its interval.

    Args:
        finetune: the point's.
        point: of a curve.

    Returns:
        The share of the utility gain kept; where a fine-tune has no gain to keep, what the point costs in
        general. None where the gain has no bounded share, so that the point cannot be drawn.
    """
    return point.kept if finetune.gains else point.general


def undrawn(report: BenchReport, finetune: FinetuneRow) -> int:
    """How many points of a fine-tune have no height."""
    return sum(height(finetune, point) is None for point in points_of(report, finetune))


def reference_rate(
    report: BenchReport, finetune: FinetuneRow, method: str, rate: Callable[[Cell], Estimate]
) -> float | None:
    """A rate of `aligned` or `finetuned`, mean over the seeds; None where it was not measured."""
    wanted = (finetune.name, method, None)
    values = [rate(c).value for c in report.cells if (c.finetune, c.method, c.strength) == wanted]
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
