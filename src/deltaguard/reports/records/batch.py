"""What became of several fine-tunes of one aligned model, restored by one command."""

from deltaguard.reports.records.base import Record
from deltaguard.reports.records.restore import PlanReport, RestoreReport


class BatchRow(Record):
    """One fine-tune; of `report`, `plan` and `error` one is there.

    Attributes:
        finetuned: what the user called it.
        output: the folder that its restored checkpoint is for.
        report: of its restore; null where there was none.
        plan: of a dry run.
        error: why it was not restored, or could not be.
    """

    finetuned: str
    output: str
    report: RestoreReport | None = None
    plan: PlanReport | None = None
    error: str | None = None


class BatchReport(Record):
    """All fine-tunes of a command.

    Attributes:
        schema_version: rises when a field changes its meaning.
        rows: in the order given.
    """

    schema_version: int = 1
    rows: tuple[BatchRow, ...]

    @property
    def failed(self) -> tuple[BatchRow, ...]:
        """List the fine-tunes that were not restored, or could not be."""
        return tuple(row for row in self.rows if row.error is not None)
