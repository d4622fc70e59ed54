"""The table of how memory and time grow with the model, drawn from `docs/results/memory.json`."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import duration, size
from tools.tables import made_with, small


class ScalingRow(BaseModel):
    """One measured process.

    Attributes:
        what: `calibrate`, block by block, or `restore`.
        against: what changes from row to row.
        value: its value.
        seconds: wall time of the process.
        peak_memory_bytes: largest resident set of the process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    against: str
    value: int
    seconds: float
    peak_memory_bytes: int


class Scaling(BaseModel):
    """`docs/results/memory.json`.

    Attributes:
        environment: machine, versions and date.
        seed: of the random models and conversations.
        base_seconds: what a process takes that imports the same and does nothing.
        rows: what was measured.
        exponents: the power of the width that the time of each grows with, less that base; null where no two
            runs took much longer than it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    seed: int
    base_seconds: float
    rows: tuple[ScalingRow, ...]
    exponents: dict[str, float | None]


def scaling_table(content: str) -> str:
    """Draw peak memory against depth, shards and conversations, and time against width.

    Args:
        content: `Scaling` as JSON.

    Returns:
        Markdown.
    """
    results = Scaling.model_validate_json(content)
    smallest: dict[tuple[str, str], int] = {}
    for row in results.rows:
        smallest.setdefault((row.what, row.against), row.peak_memory_bytes)
    drawn = Table.of(
        "",
        results.rows,
        (
            (Column("what", "name"), lambda row: f"**{row.what}**"),
            ("against", lambda row: f"{row.value} {row.against}"),
            ("peak memory", lambda row: size(row.peak_memory_bytes)),
            (
                "over the first",
                lambda row: f"{(row.peak_memory_bytes - smallest[row.what, row.against]) / 1e6:+.0f} MB",
            ),
            ("time", lambda row: duration(row.seconds)),
        ),
    ).markdown()
    powers = " and ".join(f"{power:.2f} for {what}" for what, power in results.exponents.items() if power)
    told = (
        f"Time grows with the width to the power {powers}, fitted to runs that take more than half as long "
        f"again as a start, less its {duration(results.base_seconds)}."
    )
    made = small(f"Seed {results.seed}. {made_with(results.environment)}")
    return f"{drawn}\n\n{told}\n\n{made}"
