"""Reports as rich tables; whoever calls these functions prints them."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deltaguard.reports.facts import Facts, option_facts, outcome_facts
from deltaguard.reports.layers import Kind, Spread, kinds, other_groups
from deltaguard.reports.records.base import RateRow
from deltaguard.reports.records.demo import DemoReport
from deltaguard.reports.records.restore import LayerRow, OtherRow, RestoreReport
from deltaguard.reports.records.sweep import SweepReport
from deltaguard.reports.text import DASH, interval, model_label, percent, short_reference


def restore_table(report: RestoreReport) -> RenderableType:
    """What a restore did: the choices, the numbers, the layers by kind, and the other tensors.

    Args:
        report: of a finished restore.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.

    Example:
        ```python
        Console(stderr=True).print(restore_table(report))
        ```
    """
    options = ", ".join(f"{name} {value}" for name, value in option_facts(report.options) if name != "method")
    method = dict(option_facts(report.options)).get("method", DASH)
    chosen = ("method", f"{method} ({options})" if options else method)
    parts = [
        facts_grid((*model_names(report), chosen, *outcome_facts(report))),
        _section(
            "Restored layers by kind (kept: share of the energy; costs: medians)", _kinds_table(report.layers)
        ),
    ]
    if report.others:
        parts.append(_section("Other tensors", _others_table(report.others)))
    return Group(*parts)


def demo_table(report: DemoReport) -> RenderableType:
    """The three models side by side: each rate with its 95 % interval and the number of answers.

    Args:
        report: of a finished demo.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.
    """
    table = _table()
    table.add_column("model", no_wrap=True)
    for name, better in (
        ("attack success", "lower is better"),
        ("false refusals", "lower is better"),
        ("task accuracy", "higher is better"),
    ):
        table.add_column(Text.assemble(name, "\n", (better, "dim not bold")), no_wrap=True)
    for model in report.models:
        rates = (model.attack_success, model.false_refusal, model.task_accuracy)
        strong = "bold" if model.name == "restored" else ""
        table.add_row(Text(model_label(model.name), strong), *(_rate(rate, strong) for rate in rates))
    return Group(
        _section("Three models, measured alike (below each rate its 95 % interval)", table),
        Text(),
        facts_grid(_demo_facts(report)),
    )


def model_names(report: RestoreReport | SweepReport) -> Facts:
    """The two models by the names that people know."""
    return (
        ("fine-tuned", short_reference(report.finetuned.reference)),
        ("aligned", short_reference(report.aligned.reference)),
    )


def _demo_facts(report: DemoReport) -> Facts:
    facts = [("share of the task gain kept", percent(report.kept_gain))]
    if any(model.incoherent_answers for model in report.models):
        counts = ", ".join(f"{model_label(model.name)} {model.incoherent_answers}" for model in report.models)
        facts.append(("incoherent answers to harmful prompts", counts))
    return tuple(facts)


def _rate(rate: RateRow, strong: str) -> Text:
    return Text.assemble((percent(rate.value), strong), f" (n={rate.total})\n", (interval(rate), "dim"))


def _kinds_table(layers: tuple[LayerRow, ...]) -> Table:
    table = _table()
    table.add_column("layer", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for name in ("kept min", "median", "max", "safety cost", "utility loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in kinds(layers):
        table.add_row(Text(kind.label), str(len(kind.layers)), *_kind_numbers(kind))
    return table


def _kind_numbers(kind: Kind) -> tuple[str, ...]:
    low = percent(kind.kept_energy.low) if kind.kept_energy else DASH
    high = percent(kind.kept_energy.high) if kind.kept_energy else DASH
    return low, _median(kind.kept_energy), high, _median(kind.safety_cost), _median(kind.utility_loss)


def _median(numbers: Spread | None) -> str:
    return percent(numbers.median) if numbers else DASH


def _others_table(others: tuple[OtherRow, ...]) -> Table:
    table = _table()
    table.add_column("taken from", no_wrap=True)
    for name in ("tensors", "differing"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for group in other_groups(others):
        table.add_row(model_label(group.source), str(group.count), str(group.differing), Text(group.reason))
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False)


def _section(title: str, table: Table) -> RenderableType:
    return Group(Text(), Text(f" {title}", "bold"), Text(), table)


def facts_grid(facts: Facts) -> RenderableType:
    """Labels and texts side by side, in the order given."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(label, Text(text))
    return Padding(grid, (0, 0, 0, 1))
