"""Several fine-tunes of one aligned model, as a terminal shows them."""

from rich.console import RenderableType

from deltaguard.reports.outcome import energy_kept
from deltaguard.reports.records.batch import BatchReport, BatchRow
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, nats, points, short_reference, size


def batch_table(batch: BatchReport) -> RenderableType:
    """Draw what became of each fine-tune: what was kept and measured, or what would be read and written."""
    fine_tuned = (Column("fine-tuned", "name", code=True), lambda row: short_reference(row.finetuned))
    outcome = (Column("outcome", "words"), _outcome)
    if any(row.plan for row in batch.rows):
        columns = (
            fine_tuned,
            ("restored", lambda row: row.plan.restored if row.plan else DASH),
            ("read", lambda row: size(row.plan.read_bytes) if row.plan else DASH),
            ("written", lambda row: size(row.plan.write_bytes) if row.plan else DASH),
            outcome,
        )
        return Table.of("Plan (nothing is written)", batch.rows, columns, note="tensors and bytes").terminal()
    columns = (
        fine_tuned,
        ("kept", lambda row: energy_kept(row.report) if row.report else DASH),
        ("added", _added),
        ("safety KL", _safety_kl),
        outcome,
    )
    note = "kept: of the delta's energy; added: points of attack success"
    return Table.of("Fine-tunes", batch.rows, columns, note=note).terminal()


def _added(row: BatchRow) -> str:
    attack = row.report.dial.attack if row.report and row.report.dial else None
    return points(100 * attack.restored.attack_success.added) if attack else DASH


def _safety_kl(row: BatchRow) -> str:
    return nats(row.report.dial.restored_kl) if row.report and row.report.dial else DASH


def _outcome(row: BatchRow) -> str:
    """Say where a result lies, or that there is none; why was told as it failed."""
    if row.plan is not None:
        return row.plan.note or "can be restored"
    if row.report is None:
        return "failed"
    kept_whole = row.report.dial is not None and row.report.dial.whole
    return f"kept whole, {row.output}" if kept_whole else row.output
