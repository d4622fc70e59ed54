"""A restore that writes a PEFT adapter over the aligned model instead of a whole checkpoint."""

from collections.abc import Iterator, Sequence

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.adapter_writer import stage_adapter
from deltaguard.models.mirror import beside_adapter
from deltaguard.models.shards import DTYPES
from deltaguard.models.writer import CheckpointWriter
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.restore import LayerRow, OtherRow
from deltaguard.restoration.edit import edit, factors_of
from deltaguard.restoration.inputs import read_ahead
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.price import restored_deltas, restored_steps
from deltaguard.solvers.low_rank import LowRank

Layer = tuple[str, LowRank, bool]


def refuse_what_no_adapter_holds(job: Job, plan: Plan) -> None:
    """An adapter changes linear layers and nothing else.

    Raises:
        DeltaguardError: the plan takes another tensor from the fine-tuned model; all such are listed.
    """
    beyond = [step.info.name for step in plan.steps if step.action in (Action.FINETUNED, Action.EXTEND)]
    if beyond:
        raise DeltaguardError(
            listed(
                f"An adapter over {job.aligned.reference} cannot hold what comes from "
                f"{job.finetuned.reference} besides linear layers; write a checkpoint",
                [f"`{name}`" for name in beyond],
            )
        )


def stage_restored_adapter(
    job: Job,
    plan: Plan,
    config: RestoreConfig,
    mu: float | None,
    writer: CheckpointWriter,
    progress: Progress | None,
) -> list[LayerRow | OtherRow]:
    """Restore layer by layer and stage the adapter; `commit_adapter` moves it into place.

    Returns:
        The rows of the report.

    Raises:
        DeltaguardError: a layer cannot be restored, or the adapter not be written.
    """
    from deltaguard.models.loading import module_names

    others = [step for step in plan.steps if step.action is not Action.RESTORE]
    rows: list[LayerRow | OtherRow] = [*_other_rows(job, others, config)]
    layers = _layers(job, plan, config, mu, rows, progress or ignore)
    files = beside_adapter(job.aligned, job.finetuned, config_from=config.config_from)
    modules = module_names(job.aligned.folder)
    stage_adapter(writer, job.aligned, layers, modules=modules, companions=files)
    return rows


def _other_rows(job: Job, steps: Sequence[Step], config: RestoreConfig) -> Iterator[LayerRow | OtherRow]:
    """What is no linear layer stays aligned; of an adapter, what it leaves alone is not read."""
    tuned = job.finetuned
    touched = tuned.adapted if isinstance(tuned, AdapterCheckpoint) else tuned.tensors.keys()
    for step in steps:
        if step.info.name not in touched:
            yield OtherRow(name=step.info.name, source="aligned", reason=step.reason, differs=False)
    changed = [step for step in steps if step.info.name in touched]
    for inputs in read_ahead(changed, job.aligned, tuned, None):
        yield edit(inputs, config, None, DTYPES[inputs.step.info.dtype]).row


def _layers(
    job: Job,
    plan: Plan,
    config: RestoreConfig,
    mu: float | None,
    rows: list[LayerRow | OtherRow],
    report: Progress,
) -> Iterator[Layer]:
    steps = restored_steps(plan)
    for number, inputs in enumerate(restored_deltas(job, steps, config), start=1):
        factors, row = factors_of(inputs, config, mu)
        rows.append(row)
        report(Event("restore", number, len(steps)))
        yield inputs.step.aligned_name.removesuffix(".weight"), factors, inputs.step.transposed
