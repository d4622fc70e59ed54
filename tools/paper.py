"""The table of what large models would take, drawn from `docs/results/paper.json`."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.calibrate import CalibrationPlan
from deltaguard.reports.records.restore import PlanReport
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import size
from tools.tables import made_with, small


class PaperRow(BaseModel):
    """What one model would take.

    Attributes:
        name: of the model.
        parameters: how many it has.
        weights_bytes: of its files.
        calibration: as `deltaguard calibrate --dry-run` says, block by block in bfloat16.
        restore: as `deltaguard restore --dry-run` says, at a strength; without time, which is the machine's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: int
    weights_bytes: int
    calibration: CalibrationPlan
    restore: PlanReport


class Paper(BaseModel):
    """`docs/results/paper.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    rows: tuple[PaperRow, ...]


def paper_table(content: str) -> str:
    """Draw the memory and disk that calibrating and restoring would take.

    Args:
        content: `Paper` as JSON.

    Returns:
        Markdown.
    """
    results = Paper.model_validate_json(content)

    def calibrating(row: PaperRow) -> int:
        plan = row.calibration
        beside = max(plan.sums_bytes + plan.pass_bytes, plan.predicted_bytes)
        return plan.weights_bytes + beside + plan.hidden_bytes

    drawn = Table.of(
        "",
        results.rows,
        (
            (Column("model", "name"), lambda row: row.name),
            ("weights", lambda row: size(row.weights_bytes)),
            ("calibrate: answering", lambda row: size(row.calibration.answering_bytes)),
            ("calibrate: memory", lambda row: size(calibrating(row))),
            ("of it sums", lambda row: size(row.calibration.sums_bytes)),
            ("disk meanwhile", lambda row: size(row.calibration.disk_bytes)),
            ("store", lambda row: size(row.calibration.store_bytes or 0)),
            ("restore: memory", lambda row: size(row.restore.peak_bytes)),
            ("reads", lambda row: size(row.restore.read_bytes + row.restore.curvature_bytes)),
            ("writes", lambda row: size(row.restore.write_bytes)),
        ),
    ).markdown()
    first = results.rows[0].calibration
    told = (
        f"Block by block in bfloat16, {first.conversations} conversations, {first.tokens} tokens in all at "
        "most; answers are given block by block, too, and need nothing where the conversations have them."
    )
    return f"{drawn}\n\n{told}\n\n{small(made_with(results.environment))}"
