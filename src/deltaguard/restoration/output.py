"""The output of a restore: what it is known by, what it consists of, and whether it may be written."""

import hashlib
import json
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from deltaguard import __version__
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.adapter import ADAPTER_FILE, AdapterCheckpoint
from deltaguard.models.adapter_writer import adapter_dtype
from deltaguard.models.admission import WriteRequest, check_output
from deltaguard.models.durable import explained
from deltaguard.models.journal import JOURNAL_NAME
from deltaguard.models.layout import ADAPTER_CONFIG, STAGING_FOLDER
from deltaguard.models.mirror import adapter_files, checkpoint_files
from deltaguard.models.staging import StagedFiles
from deltaguard.models.writer import CheckpointWriter
from deltaguard.ranks import Ranks
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME, RestoreReport
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan
from deltaguard.restoration.verify import read_report

_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Output:
    """What a restore writes into a folder.

    Attributes:
        folder: the output folder.
        plan_hash: what it is made from; None of a job whose curvature is not measured yet.
        names: of all files.
        needed: bytes on disk, most of them at once.
        what: words on that number, to follow "bytes".
    """

    folder: Path
    plan_hash: str | None
    names: Collection[str]
    needed: int
    what: str


def describe_output(job: Job, plan: Plan, folder: Path, config: RestoreConfig) -> Output:
    """Say what a restore will write, from headers and file sizes alone.

    Args:
        job: the models and the store.
        plan: what becomes of every tensor.
        folder: the output folder.
        config: the options.

    Raises:
        DeltaguardError: a file that would come along is a link out of its model's folder.
    """
    if config.output_format == "adapter":
        weights = [ADAPTER_FILE, ADAPTER_CONFIG]
        copied = adapter_files(job.aligned, job.finetuned, config_from=config.config_from)
        # Twice: its factors wait on disk until all are known.
        needed, what = 2 * adapter_bytes(job, plan, config), f" at rank {config.adapter_rank}"
        if config.adapter_rank is None:
            what = " at most, as ranks are not known before the work (--adapter-rank bounds them)"
    else:
        weights = list(job.finetuned.shards)
        copied = checkpoint_files(job.aligned, job.finetuned, config_from=config.config_from)
        headers = sum(len(job.finetuned.header(shard)) for shard in job.finetuned.shards)
        needed, what = plan.write_bytes + headers, ""
    with explained(folder):
        needed += sum(source.stat().st_size for source in copied.values())
    known = job.store is not None or not config.needs_curvature
    names = frozenset({*weights, *copied, REPORT_NAME, CARD_NAME})
    return Output(folder, _plan_hash(job, config) if known else None, names, needed, what)


def open_writer(job: Job, output: Output, config: RestoreConfig) -> CheckpointWriter:
    """Open the writer of an output.

    Raises:
        DeltaguardError: the output folder cannot be written to, or holds what must stay.
    """
    assert output.plan_hash is not None, "a job that is carried out has its curvature"  # noqa: S101
    return CheckpointWriter(
        output.folder,
        plan_hash=output.plan_hash,
        names=output.names,
        resume=config.resume,
        overwrite=config.overwrite,
        protected=_inputs(job),
    )


def write_beside(output: Output, ranks: Ranks) -> AbstractContextManager[StagedFiles]:
    """Write files of an output whose writer is open in rank 0; the arguments are those of `serve`.

    Raises:
        DeltaguardError: the output folder cannot be written to.
    """
    assert output.plan_hash is not None, "a job that is carried out has its curvature"  # noqa: S101
    out = output.folder.absolute()
    return StagedFiles.beside(out, number=ranks.rank, plan_hash=output.plan_hash)


def refuse_output(job: Job, output: Output, config: RestoreConfig) -> int:
    """Refuse an output that a restore would refuse; nothing is made.

    Returns:
        The bytes that are still to be written.

    Raises:
        DeltaguardError: as `open_writer`, or the disk is too small.
    """
    request = WriteRequest(output.names, output.plan_hash, config.resume, config.overwrite)
    return check_output(
        output.folder, request, protected=_inputs(job), needed=output.needed, what=output.what
    )


def finished_report(job: Job, output: Output, config: RestoreConfig) -> RestoreReport | None:
    """Find the report of an output that is to be resumed and is finished already, else None.

    Args:
        job: the models and the store.
        output: what would be written.
        config: the options.

    Raises:
        DeltaguardError: the folder is the finished output of another job, or has been changed since, and may
            not be overwritten. What differs is said.
    """
    folder = output.folder
    in_progress = (folder / STAGING_FOLDER / JOURNAL_NAME).exists()
    if not config.resume or in_progress or not (folder / REPORT_NAME).exists():
        return None
    report = read_report(folder)
    is_same = output.plan_hash is not None and report.plan_hash == output.plan_hash
    # The same job may name a model by another path.
    differences = [] if is_same else _differences(job, report, config)
    if output.plan_hash is not None and not is_same:
        differences = differences or ["its report does not say what differs"]
    problems = differences or _changes(folder, report)
    what = "another job, so there is nothing to resume" if differences else "this job and has been changed"
    title = f"{folder} is the finished output of {what}"
    if not problems:
        return report
    if config.overwrite:
        return None
    raise DeltaguardError(
        f"{listed(title, problems)}\nChoose another output folder, or replace the output with --overwrite."
    )


def _inputs(job: Job) -> tuple[Path, ...]:
    others = (other.source.folder for other in job.others.values())
    return job.aligned.folder, job.finetuned.folder, *others, *([job.store.folder] if job.store else [])


def _plan_hash(job: Job, config: RestoreConfig) -> str:
    """Say what produced a half-written output: it can be resumed by the same job alone."""
    store = job.store.provenance if job.store else None
    # Further models count by what they hold, as the two others do.
    solved = {name: value for name, value in config.what_is_solved().items() if name not in job.others}
    parts = [
        __version__,
        job.aligned_identity.key,
        job.finetuned_identity.key,
        *(f"{role} {other.source.fingerprint()}" for role, other in sorted(job.others.items())),
        store.model_dump_json() if store else "",
        # Of stores that say the same of their making, one may know it and another not.
        leaning.sha256 if (leaning := job.store.manifest.leaning if job.store else None) else "",
        json.dumps(solved, sort_keys=True),
        *(job.finetuned.header(shard).hex() for shard in job.finetuned.shards),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def adapter_bytes(job: Job, plan: Plan, config: RestoreConfig) -> int:
    """Say what an adapter takes at most."""
    tuned, rank, total = job.finetuned, config.adapter_rank, 0
    itemsize = adapter_dtype(job.aligned).itemsize
    for step in plan.steps:
        if step.action is not Action.RESTORE:
            continue
        if not isinstance(tuned, AdapterCheckpoint) or step.info.name in tuned.adapted:
            rows, columns = step.matrix_shape
            full = min(rows, columns)
            total += min(rank or full, full) * (rows + columns) * itemsize
    return total


def _changes(folder: Path, report: RestoreReport) -> list[str]:
    """Files that are gone or of another size; `verify` reads them."""
    problems: list[str] = []
    for row in report.files:
        path = folder / row.name
        if not path.is_file():
            problems.append(f"{row.name} is not there")
        elif path.stat().st_size != row.bytes:
            problems.append(
                f"{row.name} has {path.stat().st_size:,} bytes; it was written with {row.bytes:,}"
            )
    return problems


def _differences(job: Job, report: RestoreReport, config: RestoreConfig) -> list[str]:
    """Say what a finished job and this one have not in common, as far as a report says."""
    wanted = config.what_is_solved()
    problems = [
        f"{name} is {report.options.get(name)} there and {wanted.get(name)} here"
        for name in dict.fromkeys((*wanted, *report.options))
        if report.options.get(name) != wanted.get(name)
    ]
    conversations = job.store.provenance.conversations_sha256 if job.store else None
    if config.needs_curvature and job.store is None:
        # They are not known before the calibration.
        conversations = report.store_conversations
    for what, there, here in (
        ("the aligned model's fingerprint", report.aligned.fingerprint, job.aligned.fingerprint()),
        ("the fine-tuned model's fingerprint", report.finetuned.fingerprint, job.finetuned.fingerprint()),
        ("the hash of the safety conversations", report.store_conversations, conversations),
    ):
        if there != here:
            problems.append(f"{what} is {_short(there)} there and {_short(here)} here")
    made_by = report.environment.versions.get("deltaguard")
    if made_by != __version__:
        problems.append(f"deltaguard {made_by} wrote it, and this is {__version__}")
    return problems


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:_SHOWN_DIGITS]}..."
