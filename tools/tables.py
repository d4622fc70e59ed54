"""Tables of evaluations and benches for README and docs, drawn from their JSON."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from deltaguard.reports.bench_facts import short_command
from deltaguard.reports.bench_tables import bench_markdown
from deltaguard.reports.evaluation_view import SECONDARY, bounds_text, measure_label, value_text
from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.bench import ALIGNED, FINETUNED, BenchReport, Score
from deltaguard.reports.records.evaluation import Comparison, EvaluationReport, Measure
from deltaguard.reports.text import (
    DASH,
    duration,
    model_label,
    moment,
    percent,
    plain,
    points,
    points_interval,
    share_interval,
)
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL

ARROWS = {"lower": "↓", "higher": "↑"}


def evaluation_table(content: str) -> str:
    """The models of an evaluation side by side: a row a measure, each number with its interval.

    Args:
        content: an `EvaluationReport` as JSON.

    Returns:
        Markdown: a table, what the paired comparisons found, how far the judges agree, how it was made.
    """
    report = EvaluationReport.model_validate_json(content)
    prompts = "; ".join(f"{plain(s.title)}: {s.prompts}" for s in report.sections if "/" not in s.name)
    counted = f"In brackets 95 % intervals. Prompts: {prompts}. {_agreement(report)}"
    return "\n\n".join((_measures(report, report.measures), counted, _found(report), _made(report)))


def evaluation_summary(content: str) -> str:
    """The same by the first judge alone, and on plain harmful requests by all.

    Args:
        content: an `EvaluationReport` as JSON.

    Returns:
        Markdown, as `evaluation_table`; of the comparisons those of the last model.
    """
    report = EvaluationReport.model_validate_json(content)
    judge = next((m.judge for m in report.measures if m.judge), None)
    plainly = next((s.name for s in report.sections if s.kind == "attack"), None)
    shown = [m for m in report.measures if m.judge in (None, judge) or m.section == plainly]
    agreed = _agreement(
        report.model_copy(update={"agreements": [a for a in report.agreements if a.section == plainly]})
    )
    counted = f"In brackets 95 % intervals. {agreed}"
    last = report.models[-1].name
    compared = [c for c in report.comparisons if c.model == last]
    found = _found(report.model_copy(update={"comparisons": compared}))
    return "\n\n".join((_measures(report, shown), counted, found, _made(report)))


def bench_table(content: str) -> str:
    """The scores of a bench, and how they were made.

    Args:
        content: a `BenchReport` as JSON.

    Returns:
        Markdown.
    """
    report = BenchReport.model_validate_json(content)
    notes = "\n".join(f"- {plain(note)}" for note in report.notes)
    return "\n\n".join((bench_markdown(report).rstrip(), notes, _bench_made(report)))


def bench_summary(content: str) -> str:
    """A bench in a few rows: on each fine-tune the two models, and every method at its largest safe strength.

    Args:
        content: a `BenchReport` as JSON.

    Returns:
        Markdown: a table, and how it was made.
    """
    report = BenchReport.model_validate_json(content)
    head = ("", *(plain(row.title.partition(" (")[0]) for row in report.finetunes))
    rows = [
        (
            "**aligned**, **fine-tuned**: attack success",
            *(_both(report, row.name) for row in report.finetunes),
        )
    ]
    for method in dict.fromkeys(score.method for score in report.scores):
        found = {score.finetune: score for score in report.scores if score.method == method}
        rows.append(
            (f"**{plain(method)}**: gain kept", *(_kept(found[row.name]) for row in report.finetunes))
        )
    bound = f"{report.bound:g} points"
    said = (
        f"Each method at the largest strength tried whose attack success is at most {bound} over the aligned "
        "model's (in brackets how far over); a dash where nothing is gained or no strength tried is safe."
    )
    made = small(f"Preset {report.preset}, {_seeds(report)}. {made_with(report.environment)}")
    return "\n\n".join((table(head, rows), said, made))


def bench_default(content: str) -> str:
    """What the default dial does on every fine-tune of a bench.

    Args:
        content: a `BenchReport` as JSON, with `kfac` at its default limit among the strengths.

    Returns:
        Markdown: a table, and how it was made.

    Raises:
        ValueError: a fine-tune was not restored at that limit.
    """
    report = BenchReport.model_validate_json(content)
    found = {
        p.finetune: p for p in report.curves if (p.method, p.strength) == ("kfac", DEFAULT_MAX_SAFETY_KL)
    }
    if missing := [row.name for row in report.finetunes if row.name not in found]:
        raise ValueError(
            f"`{report.command}` measured no `kfac` at the default limit {DEFAULT_MAX_SAFETY_KL:g} on "
            f"{', '.join(missing)}: run it again."
        )
    head = ("fine-tune", "aligned, fine-tuned", "attack success over aligned (95 %)")
    head = (*head, "false refusals over aligned (95 %)", "gain kept (95 %)")
    rows = [
        (
            plain(row.title),
            _both(report, row.name),
            f"{points(point.points.value)} ({points_interval(point.points)})",
            f"{points(point.false_refusal.value)} ({points_interval(point.false_refusal)})",
            f"{percent(point.kept.value)} ({share_interval(point.kept)})" if point.kept else DASH,
        )
        for row in report.finetunes
        for point in (found[row.name],)
    ]
    said = (
        "Aligned, fine-tuned: attack success. Over aligned: in points, on the same prompts. A dash where "
        "there is no gain to keep, or one too small for a share with a bounded interval."
    )
    return "\n\n".join((table(head, rows, ("fine-tune",)), said, _bench_made(report)))


def _bench_made(report: BenchReport) -> str:
    return small(
        f"`{plain(short_command(report.command))}`; preset {report.preset}, {_seeds(report)}; "
        f"{duration(report.seconds['total'])} in all. {made_with(report.environment)}"
    )


def _seeds(report: BenchReport) -> str:
    return f"seed{'s' * (len(report.seeds) > 1)} {', '.join(map(str, report.seeds))}"


def _both(report: BenchReport, finetune: str) -> str:
    """Attack success of the aligned and the fine-tuned model, means over the seeds."""
    rates = {
        name: mean(
            cell.attack_success.value
            for cell in report.cells
            if cell.finetune == finetune and cell.method == name
        )
        for name in (ALIGNED, FINETUNED)
    }
    return ", ".join(percent(rate) for rate in rates.values())


def _kept(score: Score | None) -> str:
    if score is None or score.points is None:
        return DASH
    return f"{percent(score.kept.value) if score.kept else DASH} ({score.points.value:+.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ("",)) -> str:
    """A Markdown table; columns whose head is in `words` are aligned left, all others right."""
    rule = ("---" if name in words else "---:" for name in head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def small(text: str) -> str:
    """Small print."""
    return f"<sub>{text}</sub>"


def made_with(environment: Environment) -> str:
    """Date, device and versions."""
    versions = ", ".join(f"{name} {release}" for name, release in environment.versions.items())
    return f"{moment(environment.created)}; {environment.device}; {environment.machine}; {versions}."


def _measures(report: EvaluationReport, measures: Sequence[Measure]) -> str:
    """A row a measure and a column a model; broken and undecided answers only where there are any."""
    names = [model.name for model in report.models]
    titles = {section.name: section.title for section in report.sections}
    head = ("", *(f"**{plain(model_label(name))}**" for name in names))
    rows = [
        (_row_name(titles, measure), *(_number(found.get(name)) for name in names))
        for measure, found in _by_row(measures)
        if measure.name not in SECONDARY or any(each.estimate.value for each in found.values())
    ]
    return table(head, rows)


def _found(report: EvaluationReport) -> str:
    """What the first judge's paired comparisons with the first model support, a line a model."""
    titles = {section.name: section.title for section in report.sections}
    judge = next((m.judge for m in report.measures if m.judge), None)
    told = [c for c in report.comparisons if c.judge in (None, judge) and c.name not in SECONDARY]
    lines: list[str] = []
    for model in dict.fromkeys(c.model for c in told):
        of_model = [c for c in told if c.model == model]
        parts = [
            f"{finding}: {', '.join(_compared(titles, c) for c in found)}"
            for finding in ("higher", "lower", "not told apart")
            if (found := [c for c in of_model if c.finding == finding])
        ]
        reference = plain(model_label(of_model[0].reference))
        lines.append(f"- **{plain(model_label(model))}** against {reference}: {'; '.join(parts)}.")
    return "Paired on the same prompts:\n\n" + "\n".join(lines) if lines else ""


def _compared(titles: Mapping[str, str], comparison: Comparison) -> str:
    return f"{plain(titles[comparison.section])}: {measure_label(comparison.name)}"


def _made(report: EvaluationReport) -> str:
    made = f"Suite {plain(report.suite)}, engine {plain(report.engine)}. {made_with(report.environment)}"
    return small(made)


def _by_row(measures: Sequence[Measure]) -> list[tuple[Measure, dict[str, Measure]]]:
    """What belongs side by side, in order of appearance: a measure that names the row, and all by model."""
    rows: dict[tuple[str, str, str | None], dict[str, Measure]] = {}
    for measure in measures:
        rows.setdefault((measure.section, measure.name, measure.judge), {})[measure.model] = measure
    return [(next(iter(row.values())), row) for row in rows.values()]


def _row_name(titles: dict[str, str], measure: Measure) -> str:
    judge = f", judge {measure.judge}" if measure.judge else ""
    return plain(f"{titles[measure.section]}: {measure_label(measure.name)}{judge} {ARROWS[measure.better]}")


def _number(measure: Measure | None) -> str:
    if measure is None:
        return DASH
    return f"{value_text(measure.estimate)}<br>({bounds_text(measure.estimate)})"


def _agreement(report: EvaluationReport) -> str:
    told = [
        plain(f"{a.first} and {a.second} on {a.section}: κ = {a.kappa:.2f}")
        for a in report.agreements
        if a.kappa is not None
    ]
    return f"Agreement of the judges (Cohen's κ): {'; '.join(told)}." if told else ""
