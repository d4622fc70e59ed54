"""A bench in words, the same in terminals, Markdown and pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltaguard.reports.bench_view import (
    contests_of,
    points_of,
    preparation,
    reference_rate,
    scores_of,
    undrawn,
)
from deltaguard.reports.records.bench import (
    ALIGNED,
    FINETUNED,
    BenchReport,
    Cell,
    Contest,
    FinetuneRow,
    Score,
    Training,
)
from deltaguard.reports.records.evaluation import Estimate
from deltaguard.reports.text import (
    DASH,
    duration,
    model_label,
    option,
    percent,
    points,
    points_interval,
    share_interval,
)

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


@dataclass(frozen=True)
class ContestText:
    """The method that keeps most beside another, in words.

    Attributes:
        other: name of the other method.
        kept: share of the gain that the leader keeps less the other's, in points.
        points: attack success of the leader less the other's, in points.
        false_refusal: likewise, of false refusals.
        told_apart: whether the two differ in what they keep.
    """

    other: str
    kept: NumberText
    points: NumberText
    false_refusal: NumberText
    told_apart: str


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
    return (f"not drawn, without a bounded share of gain: {missing} of {total} points",) if missing else ()


def contest_texts(report: BenchReport, finetune: FinetuneRow) -> tuple[tuple[Contest, ContestText], ...]:
    """The method that keeps most of one fine-tune's gain beside each other, each with its words."""
    return tuple((contest, _contest_text(contest)) for contest in contests_of(report, finetune))


def contest_line(report: BenchReport, finetune: FinetuneRow) -> str:
    """Which methods the one that keeps most is told apart from; empty where there are no two to compare.

    Example:
        ```python
        contest_line(report, finetune)  # "greedy keeps most; told apart from wise-ft, not from published."
        ```
    """
    contests = contests_of(report, finetune)
    if not contests:
        return ""
    told, rest = (
        ", ".join(contest.other for contest in contests if contest.told_apart == apart)
        for apart in (True, False)
    )
    parts = [f"told apart from {told}"] * bool(told) + [f"not told apart from {rest}"] * bool(rest)
    return f"{contests[0].leader} keeps most at a safe strength: {'; '.join(parts)}."


def legend(report: BenchReport) -> str:
    """What the columns of the scores mean."""
    return (
        "Each method stands at its largest strength whose attack success is at most "
        f"{report.bound:g} points over the aligned model's. Over aligned: the method's rate less the aligned "
        "model's on the same prompts, in points. Gain kept: share of the fine-tune's utility gain; a dash "
        "where none of the strengths tried is safe, where there is no gain to keep, or where the gain is too "
        "small for a share with a bounded interval; without an interval where every example gives the same "
        "share. Told apart: whether the 95 % interval of attack success "
        "over aligned leaves the bound out, at that strength or, where none is safe, at every one tried; "
        "where it does not, the side of the bound may be chance. Request: time for one fine-tune."
    )


def contest_legend(report: BenchReport) -> str:
    """What the comparisons of methods with each other mean; empty where there are none."""
    if not report.contests:
        return ""
    return (
        "Keeps most: the method with the largest gain kept, less each other one, both at their largest safe "
        "strength, paired on the same prompts, in points. Two methods are told apart where the 95 % interval "
        "of the gain leaves 0 out and the p-value, times the number of pairs of methods, is under 0.05. All "
        "strengths, and so the method that keeps most, were picked on these very prompts, which favours it."
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
        kept=_share_text(score.kept),
        told_apart=option(score.told_apart) if measured else DASH,
        request=DASH if score.request_seconds is None else duration(score.request_seconds),
    )


def _points_text(estimate: Estimate | None) -> NumberText:
    if estimate is None:
        return NumberText(DASH, "")
    return NumberText(points(estimate.value), points_interval(estimate))


def _share_text(estimate: Estimate | None) -> NumberText:
    if estimate is None:
        return NumberText(DASH, "")
    # "0.0 to 0.0 %" would look like certainty, where all examples came out alike.
    return NumberText(
        percent(estimate.value), share_interval(estimate) if estimate.low < estimate.high else ""
    )


def _contest_text(contest: Contest) -> ContestText:
    ends = (points(100 * end) for end in (contest.kept.low, contest.kept.high))
    return ContestText(
        other=contest.other,
        kept=NumberText(points(100 * contest.kept.value), " to ".join(ends)),
        points=_points_text(contest.points),
        false_refusal=_points_text(contest.false_refusal),
        told_apart=option(contest.told_apart),
    )
