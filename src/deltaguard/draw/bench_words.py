"""A bench in words, the same in terminals, Markdown and pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltaguard.draw.bench_view import points_of, preparation, reference_rate, scores_of, undrawn
from deltaguard.draw.text import (
    DASH,
    duration,
    model_label,
    option,
    percent,
    points,
    points_interval,
    share_interval,
)
from deltaguard.report.bench import ALIGNED, FINETUNED, BenchReport, Cell, FinetuneRow, Score, Training
from deltaguard.report.evaluation import Estimate

NOT_SAFE = "none safe"
"""What stands for the strength where none of those tried was within the bound."""

TRAININGS: Mapping[Training, str] = {"full": "full", "lora": "LoRA"}
"""Ways of training, as people write them."""

_RATES: Mapping[str, Callable[[Cell], Estimate]] = {
    "attack success": lambda cell: cell.attack_success,
    "false refusals": lambda cell: cell.false_refusal,
}


@dataclass(frozen=True)
class NumberText:
    """A number and its interval in words.

    Attributes:
        value: the number, a dash where there is none.
        interval: its 95 % interval, empty where there is none.
    """

    value: str
    interval: str


@dataclass(frozen=True)
class ScoreText:
    """A score in words.

    Attributes:
        method: name of the method.
        strength: the largest safe one.
        points: attack success over the aligned model's there, in points.
        false_refusal: false refusals over the aligned model's there, in points.
        kept: share of the utility gain kept.
        told_apart: whether the interval of the points leaves the bound out.
        request: time of a request.
    """

    method: str
    strength: str
    points: NumberText
    false_refusal: NumberText
    kept: NumberText
    told_apart: str
    request: str


def score_texts(report: BenchReport, finetune: FinetuneRow) -> tuple[tuple[Score, ScoreText], ...]:
    """The scores on one fine-tune, each with its words.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        Pairs in the report's order. A method without a point on any curve has dashes throughout: that no
        strength is safe would be more than was seen.

    Example:
        ```python
        score_texts(report, report.finetunes[0])[0][1].strength  # "0.1", or "none safe"
        ```
    """
    measured = {point.method for point in points_of(report, finetune)}
    return tuple(
        (score, _score_text(score, measured=score.method in measured))
        for score in scores_of(report, finetune)
    )


def finetune_facts(report: BenchReport, finetune: FinetuneRow) -> str:
    """A fine-tune in one line: how it was trained, on what, and what it did to both rates."""
    parts = [
        f"{TRAININGS[finetune.training]} fine-tuning",
        f"{finetune.examples} examples, {finetune.harmful} harmful",
    ]
    for name, rate in _RATES.items():
        before, after = (reference_rate(report, finetune, method, rate) for method in (ALIGNED, FINETUNED))
        if before is not None and after is not None:
            parts.append(f"{name} {percent(before)} {ALIGNED}, {percent(after)} {model_label(FINETUNED)}")
    return "; ".join(parts)


def panel_notes(report: BenchReport, finetune: FinetuneRow) -> tuple[str, ...]:
    """What a panel of the plot does not show, a line each."""
    missing, total = undrawn(report, finetune), len(points_of(report, finetune))
    notes: list[str] = []
    if not finetune.gains and missing < total:
        notes.append("height: mean over the seeds, without an interval")
    if missing:
        lacking = "bounded share of gain" if finetune.gains else "aligned model beside it"
        notes.append(f"not drawn, without a {lacking}: {missing} of {total} points")
    return tuple(notes)


def legend(report: BenchReport) -> str:
    """What the columns of the scores mean."""
    return (
        "Each method stands at its largest strength whose attack success is at most "
        f"{report.bound:g} points over the aligned model's. Over aligned: the method's rate less the aligned "
        "model's on the same prompts, in points. Gain kept: share of the fine-tune's utility gain; a dash "
        "where none of the strengths tried is safe, where there is no gain to keep, or where the gain is too "
        "small for a share with a bounded interval. Told apart: whether the 95 % interval of attack success "
        "over aligned leaves the bound out, at that strength or, where none is safe, at every one tried; "
        "where it does not, the side of the bound may be chance. Request: time for one fine-tune."
    )


def preparation_line(report: BenchReport) -> str:
    """How long took what an aligned model needs once; empty where nothing was timed.

    Example:
        ```python
        preparation_line(report)  # "Once per aligned model: store 44.0 s, safe 1 min 2 s."
        ```
    """
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in preparation(report).items())
    return f"Once per aligned model: {spent}." if spent else ""


def _score_text(score: Score, *, measured: bool) -> ScoreText:
    return ScoreText(
        method=score.method,
        strength=NOT_SAFE if measured and score.strength is None else option(score.strength),
        points=_points_text(score.points),
        false_refusal=_points_text(score.false_refusal),
        kept=NumberText(percent(score.kept.value), share_interval(score.kept))
        if score.kept
        else NumberText(DASH, ""),
        told_apart=option(score.told_apart) if measured else DASH,
        request=DASH if score.request_seconds is None else duration(score.request_seconds),
    )


def _points_text(estimate: Estimate | None) -> NumberText:
    if estimate is None:
        return NumberText(DASH, "")
    return NumberText(points(estimate.value), points_interval(estimate))
