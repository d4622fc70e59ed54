"""`deltaguard restore` of several fine-tunes of one aligned model."""

from collections.abc import Sequence
from pathlib import Path

from deltaguard.cli.restore import restore_one
from deltaguard.cli.sink import Reference, UsageError, complain, emit, hide_bars_of_transformers, tell
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import expanded
from deltaguard.models.admission import require_space
from deltaguard.ranks import Ranks
from deltaguard.reports.batch import batch_table
from deltaguard.reports.records.batch import BatchReport, BatchRow
from deltaguard.restoration.aligned import AlignedInputs
from deltaguard.restoration.batch import Outputs, each_of, outputs_of
from deltaguard.restoration.dry_run import plan_finetune
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import Restorer


def restore_many(
    aligned: Reference,
    finetuned: Sequence[str],
    folder: Path,
    store: Reference | None,
    config: RestoreConfig,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Restore fine-tunes one after another, or plan to, and print what became of each.

    Raises:
        DeltaguardError: some failed, or the disk is too small for all that are planned; the results of the
            others are printed.
        UsageError: several processes were started.
    """
    outputs = outputs_of(finetuned, folder)
    if dry_run:
        inputs = AlignedInputs.open(aligned, store=store, config=config)
        report = _planned(inputs, outputs)
    else:
        if Ranks.current().size > 1:
            raise UsageError("Several processes share one restore: start a run for each fine-tune.")
        hide_bars_of_transformers()
        with Restorer(aligned, store=store, config=config) as restorer:
            report = _restored(restorer, outputs)
    emit(report, batch_table(report), as_json=as_json)
    if failed := [row.finetuned for row in report.failed]:
        raise DeltaguardError(listed(f"Of {len(outputs)} fine-tunes {len(failed)} failed", failed))
    if dry_run:
        needed = sum(row.plan.disk_bytes for row in report.rows if row.plan is not None)
        require_space(expanded(folder), needed, what=f" for all {len(outputs)} restored models")


def _planned(inputs: AlignedInputs, outputs: Outputs) -> BatchReport:
    def plan(finetuned: str, output: Path) -> BatchRow:
        found = plan_finetune(inputs, finetuned, output)
        return BatchRow(finetuned=finetuned, output=str(output), plan=found)

    return each_of(outputs, plan, _tell_failure)


def _restored(restorer: Restorer, outputs: Outputs) -> BatchReport:
    numbers = {finetuned: number for number, finetuned in enumerate(outputs, start=1)}

    def restore(finetuned: str, output: Path) -> BatchRow:
        tell(f"{numbers[finetuned]} of {len(outputs)}: {finetuned}")
        report = restore_one(restorer, finetuned, output)
        return BatchRow(finetuned=finetuned, output=str(output), report=report)

    return each_of(outputs, restore, _tell_failure)


def _tell_failure(finetuned: str, message: str) -> None:
    complain(f"{finetuned}: {message}")
