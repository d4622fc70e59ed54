"""The table of times and memory, from `docs/results/benchmark.json`, which `benchmarks.run` writes."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, duration, size
from tools.tables import made_with, small


class BenchmarkRow(BaseModel):
    """One timing; `ratio` compares it with what `note` names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    seconds: float
    peak_memory_bytes: int | None = None
    ratio: float | None = None
    note: str | None = None


class Benchmarks(BaseModel):
    """`docs/results/benchmark.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    environment: Environment
    rows: tuple[BenchmarkRow, ...]


def benchmark_table(content: str) -> str:
    """Draw times and memory.

    Args:
        content: `Benchmarks` as JSON.

    Returns:
        Markdown.
    """
    results = Benchmarks.model_validate_json(content)
    drawn = Table.of(
        "",
        results.rows,
        (
            (Column("what", "name"), lambda row: row.name),
            ("time", lambda row: _seconds(row.seconds)),
            ("peak memory", lambda row: size(row.peak_memory_bytes) if row.peak_memory_bytes else DASH),
            ("ratio", lambda row: DASH if row.ratio is None else f"{row.ratio:.3g}"),
            (Column("note", "words"), lambda row: row.note or ""),
        ),
    ).markdown()
    return f"{drawn}\n\n{small(made_with(results.environment))}"


def _seconds(value: float) -> str:
    return duration(value) if value >= 1 else f"{1000 * value:.3g} ms"
