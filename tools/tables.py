"""Tables of evaluations and benches for README and docs, drawn from their JSON."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean

from deltaguard.cli.presets import PRESETS, read_options
from deltaguard.reports.attacks import attacks_markdown
from deltaguard.reports.bench import bench_markdown
from deltaguard.reports.beside import beside_tables
from deltaguard.reports.evaluation import SECONDARY, measure_label
from deltaguard.reports.records.attacks import AttacksReport
from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.bench import ALIGNED, FINETUNED, BenchReport, Score
from deltaguard.reports.records.evaluation import Comparison, EvaluationReport, Measure
from deltaguard.reports.table import Cell, Column, Table, estimate, excess, rate
from deltaguard.reports.text import (
    DASH,
    duration,
    environment_facts,
    model_label,
    percent,
    plain,
    short_command,
)
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL

ARROWS = {"lower": "↓", "higher": "↑"}


def evaluation_table(content: str) -> str:
    """Find the models of an evaluation side by side: a row a measure, each number with its interval.

    Args:
        content: an `EvaluationReport` as JSON.

    Returns:
        Markdown: a table, what the paired comparisons found, how far the judges agree, how it was made.
    """
    report = EvaluationReport.model_validate_json(content)
    prompts = "; ".join(f"{plain(s.title)}: {s.prompts}" for s in report.sections if "/" not in s.name)
    counted = f"In brackets 95 % intervals. Prompts: {prompts}. {_agreement(report)}"
    return "\n\n".join((_measures(report, report.measures), counted, _found(report), _made(report)))


def bench_table(content: str) -> str:
    """Find the scores of a bench, and how they were made.

    Args:
        content: a `BenchReport` as JSON.

    Returns:
        Markdown.
    """
    report = BenchReport.model_validate_json(content)
    notes = "\n".join(f"- {plain(note)}" for note in report.notes)
    return "\n\n".join((bench_markdown(report).rstrip(), notes, _bench_made(report)))


def attacks_table(content: str) -> str:
    """Find what came of all attackers, and how it was made.

    Args:
        content: an `AttacksReport` as JSON.

    Returns:
        Markdown.
    """
    report = AttacksReport.model_validate_json(content)
    notes = "\n".join(f"- {plain(note)}" for note in report.notes)
    return "\n\n".join((attacks_markdown(report).rstrip(), notes, _bench_made(report)))


def beside_table(content: str) -> str:
    """Draw methods beside each other over the same fine-tunes, and how it was made.

    Args:
        content: an `AttacksReport` of several methods as JSON.

    Returns:
        Markdown.

    Raises:
        ValueError: there is one method alone.
    """
    report = AttacksReport.model_validate_json(content)
    tables = beside_tables(report)
    if not tables:
        raise ValueError("one method stands beside no other")
    drawn = [f"**{plain(table.title)}** ({plain(table.note)})\n\n{table.markdown()}" for table in tables]
    notes = "\n".join(f"- {plain(note)}" for note in report.notes)
    return "\n\n".join((*drawn, notes, _bench_made(report)))


def bench_summary(content: str) -> str:
    """Draw a bench in a few rows: on each fine-tune the two models, and each method at its largest safe one.

    Args:
        content: a `BenchReport` as JSON.

    Returns:
        Markdown: a table, and how it was made.
    """
    report = BenchReport.model_validate_json(content)
    scores = {(score.finetune, score.method): score for score in report.scores}

    def shown(finetune: str, method: str | None) -> str:
        return _both(report, finetune) if method is None else _kept(scores.get((finetune, method)))

    def named(method: str | None) -> str:
        return f"**{method}**: gain kept" if method else "**aligned**, **fine-tuned**: attack success"

    columns = (
        (Column("", "name"), named),
        *((row.title.partition(" (")[0], partial(shown, row.name)) for row in report.finetunes),
    )
    methods = dict.fromkeys(score.method for score in report.scores)
    drawn = Table.of("", (None, *methods), columns).markdown()
    bound = f"{report.bound:g} points"
    said = (
        f"Each method at the largest strength tried whose attack success is at most {bound} over the aligned "
        "model's (in brackets how far over); a dash where nothing is "
        "gained, no strength tried is safe, or the method was not run."
    )
    made = small(f"Preset {report.preset}, {_seeds(report)}. {made_with(report.environment)}")
    return f"{drawn}\n\n{said}\n\n{made}"


def bench_default(content: str) -> str:
    """Say what the default dial does on every fine-tune of a bench.

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
    drawn = Table.of(
        "",
        report.finetunes,
        (
            (Column("fine-tune", "name"), lambda row: row.title),
            ("aligned, fine-tuned", lambda row: _both(report, row.name)),
            ("attack success over aligned", lambda row: excess(found[row.name].points)),
            ("false refusals over aligned", lambda row: excess(found[row.name].false_refusal)),
            ("gain kept", lambda row: rate(found[row.name].kept)),
        ),
    ).markdown()
    said = (
        "Aligned, fine-tuned: attack success. Over aligned: in points, on the same prompts. In brackets 95 % "
        "intervals. A dash where there is no gain to keep, or one too small for a share with a bounded "
        "interval."
    )
    return "\n\n".join((drawn, said, _bench_made(report)))


def bench_presets(content: str) -> str:
    """Say what the presets' limits on safety KL do on the fine-tunes that were measured at all of them.

    Args:
        content: a `BenchReport` as JSON, with `kfac` at every preset's limit on some fine-tune.

    Returns:
        Markdown: a table, and how it was made.

    Raises:
        ValueError: no fine-tune was measured at all of them.
    """
    report = BenchReport.model_validate_json(content)
    limits = {name: float(read_options(name)["max_safety_kl"]) for name in PRESETS}
    found = {(p.finetune, p.strength): p for p in report.curves if p.method == "kfac"}
    rows = [
        (row.title, name, limit, found[row.name, limit])
        for row in report.finetunes
        if all((row.name, limit) in found for limit in limits.values())
        for name, limit in limits.items()
    ]
    if not rows:
        raise ValueError(
            f"`{report.command}` has no fine-tune at all of {', '.join(map(str, limits.values()))}."
        )
    drawn = Table.of(
        "",
        rows,
        (
            (Column("fine-tune", "name"), lambda row: row[0]),
            (Column("limit of", "name"), lambda row: row[1]),
            ("safety KL", lambda row: f"{row[2]:g}"),
            ("attack success over aligned", lambda row: excess(row[3].points)),
            ("false refusals over aligned", lambda row: excess(row[3].false_refusal)),
            ("gain kept", lambda row: rate(row[3].kept)),
        ),
    ).markdown()
    said = "Held to the limit on safety KL alone, without asking; in brackets 95 % intervals."
    return "\n\n".join((drawn, said, _bench_made(report)))


def _bench_made(report: BenchReport | AttacksReport) -> str:
    return small(
        f"`{plain(short_command(report.command))}`; preset {report.preset}, {_seeds(report)}; "
        f"{duration(report.seconds['total'])} in all. {made_with(report.environment)}"
    )


def _seeds(report: BenchReport | AttacksReport) -> str:
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


def small(text: str) -> str:
    """Small print."""
    return f"<sub>{text}</sub>"


def made_with(*environments: Environment) -> str:
    """Date, device and versions; of several runs the dates, and what was not the same for all."""
    facts = [dict(environment_facts(environment)) for environment in environments]
    kinds = ("date", "device", "machine", "versions")
    told = (", ".join(dict.fromkeys(each[kind] for each in facts)) for kind in kinds)
    return f"{'; '.join(told)}."


def _measures(report: EvaluationReport, measures: Sequence[Measure]) -> str:
    """Give a row a measure and a column a model; broken and undecided answers only where there are any."""
    names = [model.name for model in report.models]
    titles = {section.name: section.title for section in report.sections}
    rows: dict[tuple[str, str, str | None], dict[str, Measure]] = {}
    for measure in measures:
        rows.setdefault((measure.section, measure.name, measure.judge), {})[measure.model] = measure

    def named(found: Mapping[str, Measure]) -> str:
        first = next(iter(found.values()))
        judge = f", judge {first.judge}" if first.judge else ""
        return f"{titles[first.section]}: {measure_label(first.name)}{judge} {ARROWS[first.better]}"

    def number(model: str, found: Mapping[str, Measure]) -> Cell:
        return estimate(found[model].estimate if model in found else None)

    columns = (
        (Column("", "name"), named),
        *((f"**{model_label(name)}**", partial(number, name)) for name in names),
    )
    told = [
        found
        for (_, name, _), found in rows.items()
        if name not in SECONDARY or any(each.estimate.value for each in found.values())
    ]
    return Table.of("", told, columns).markdown(between="<br>")


def _found(report: EvaluationReport) -> str:
    """Say what the first judge's paired comparisons with the first model support, a line a model."""
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


def _agreement(report: EvaluationReport) -> str:
    told = [
        plain(f"{a.first} and {a.second} on {a.section}: κ = {a.kappa:.2f}")
        for a in report.agreements
        if a.kappa is not None
    ]
    return f"Agreement of the judges (Cohen's κ): {'; '.join(told)}." if told else ""
