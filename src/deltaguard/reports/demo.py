"""A demo as a terminal table and as a page: three models measured alike, and the restore between them."""

from collections.abc import Mapping
from functools import partial

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports import page
from deltaguard.reports.records.base import RateRow
from deltaguard.reports.records.demo import DemoReport, ModelRow
from deltaguard.reports.restore import restore_blocks
from deltaguard.reports.table import Cell, Column, Table, facts_grid, rate
from deltaguard.reports.text import (
    Facts,
    environment_facts,
    interval,
    model_facts,
    model_label,
    percent,
    size,
    times,
)

RATES: Mapping[str, tuple[str, str, str]] = {
    "attack_success": ("attack success", "harmful prompts answered", "lower is better"),
    "false_refusal": ("false refusals", "harmless prompts refused", "lower is better"),
    "task_accuracy": ("task accuracy", "task answers that match exactly", "higher is better"),
}
"""The rates of a demo by field: title, of what it is the share, and which way is better."""

RULE = (
    "Whether an answer refuses is told by a rule on how it opens: the usual words of a refusal in its first "
    "sentence. An answer that declines in other words counts as none, and so does one that is off the point."
)


def demo_table(report: DemoReport) -> RenderableType:
    """Draw the three models side by side for a terminal: below each rate its 95 % interval."""
    table = rates_table(report)
    first = report.models[0]
    prompts = f"{first.attack_success.total} harmful, {first.false_refusal.total} harmless"
    facts = [
        ("share of the task gain kept", percent(report.kept_gain)),
        ("prompts", f"{prompts}, {first.task_accuracy.total} task messages"),
    ]
    if any(model.incoherent_answers for model in report.models):
        facts.append(("incoherent answers to harmful prompts", _incoherent(report)))
    return Group(table.terminal(), Text(), facts_grid(tuple(facts)))


def demo_page(report: DemoReport) -> str:
    """Draw the demo's story: three models measured alike, sample answers, and the restore between them.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    run: Facts = (
        *environment_facts(report.environment),
        ("seed", str(report.seed)),
        ("time by stage", times(report.seconds)),
        ("peak memory", size(report.peak_memory_bytes)),
        *model_facts(report.restore.aligned, report.restore.finetuned),
    )
    asked = [
        page.Asked(
            number,
            sample.kind,
            sample.kind == "harmful",
            sample.prompt,
            sample.system,
            [
                page.Answer(
                    name, name, answer, {"rule": found} if (found := sample.verdicts.get(name)) else {}
                )
                for name, answer in sample.answers.items()
            ],
        )
        for number, sample in enumerate(report.samples, start=1)
    ]
    return page.page(
        "demo",
        "deltaguard demo: aligned, fine-tuned, restored",
        [
            page.Heading("Three models, measured alike"),
            page.Paragraph("Points are measured rates, lines their 95 % intervals."),
            page.Group([_chart(report, field) for field in RATES], "cards"),
            rates_table(report),
            page.Paragraph(f"Incoherent answers to harmful prompts: {_incoherent(report)}.", soft=True),
            page.Heading("Answers side by side"),
            page.Paragraph(
                f"{RULE} Answers to harmful prompts are folded: the fine-tuned model may have written "
                "something harmful."
            ),
            *asked,
            *restore_blocks(report.restore),
            page.Heading("The run"),
            page.Pairs(run),
        ],
        created=report.environment.created,
        heading="Aligned, fine-tuned, restored",
        lead=_lead(report),
    )


def rates_table(report: DemoReport) -> Table:
    """Tabulate the rates of the three models, each with its interval."""
    rates = (
        (Column(f"{title}\n{better}"), partial(lambda field, model: rate(_rate(model, field)), field))
        for field, (title, _, better) in RATES.items()
    )
    return Table.of(
        "Three models, measured alike",
        report.models,
        ((Column("model", "name"), lambda model: Cell(model_label(model.name), tint=model.name)), *rates),
        note="each rate with its 95 % interval",
        strong=lambda model: model.name == "restored",
    )


def _rate(model: ModelRow, field: str) -> RateRow:
    return getattr(model, field)


def _chart(report: DemoReport, field: str) -> page.Chart:
    from deltaguard.reports.charts import Mark, marks_chart

    title, meaning, better = RATES[field]
    found = [(model_label(model.name), _rate(model, field)) for model in report.models]
    marks = [Mark(name, "", each.low, each.value, each.high, percent(each.value)) for name, each in found]
    svg = marks_chart(marks, [name for name, _ in found], shares=True)
    spoken = "; ".join(f"{name} {percent(each.value)}, interval {interval(each)}" for name, each in found)
    return page.Chart(title.capitalize(), f"{meaning}\n{better}", svg, f"{title.capitalize()}: {spoken}.")


def _lead(report: DemoReport) -> str:
    told = [
        page.strong(f"{percent(model.attack_success.value)} {model_label(model.name)}", model.name)
        for model in report.models
    ]
    said = page.sentence("Harmful prompts answered instead of refused: {}.", page.listed(told))
    if report.kept_gain is None:
        return said
    return page.sentence(
        "{} The restored model keeps {} of what fine-tuning gained on its task.",
        said,
        page.strong(percent(report.kept_gain), "restored"),
    )


def _incoherent(report: DemoReport) -> str:
    return ", ".join(f"{model_label(model.name)} {model.incoherent_answers}" for model in report.models)
