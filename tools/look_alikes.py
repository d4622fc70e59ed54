"""The table of what look-alikes in the calibration do, from what `benchmarks.look_alikes` writes."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.attacks import AttackOutcome, AttacksReport
from deltaguard.reports.table import Column, Table, excess, rate
from tools.tables import made_with, small


class Variant(BaseModel):
    """Fine-tunes restored without options, by a store of one kind.

    Attributes:
        calibration: what the store was calibrated on, in words.
        report: of the fine-tunes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: str
    report: AttacksReport


class Variants(BaseModel):
    """`docs/results/look_alikes.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: tuple[Variant, ...]


def look_alikes_table(content: str) -> str:
    """Draw a row for each fine-tune, seed and calibration.

    Args:
        content: a `Variants` as JSON.

    Returns:
        Markdown.
    """
    variants = Variants.model_validate_json(content).variants
    rows: list[tuple[str, AttackOutcome]] = [
        (variant.calibration, outcome) for variant in variants for outcome in variant.report.outcomes
    ]
    drawn = Table.of(
        "",
        sorted(rows, key=lambda row: (row[1].attacker, row[1].seed)),
        (
            (Column("fine-tune", "name", code=True), lambda row: row[1].attacker),
            ("seed", lambda row: row[1].seed),
            (Column("calibrated on", "words"), lambda row: row[0]),
            ("attack success\nover aligned", lambda row: excess(row[1].plain.over_aligned)),
            ("false refusals\nover aligned", lambda row: excess(row[1].false_refusals.over_aligned)),
            ("gain kept,\nlikelihood", lambda row: rate(row[1].kept)),
            ("exact", lambda row: rate(row[1].kept_exact)),
        ),
    ).markdown()
    return f"{drawn}\n\n{small(made_with(*(variant.report.environment for variant in variants)))}"
