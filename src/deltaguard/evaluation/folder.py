"""The folder of an evaluation: which report may take the place of which, and how it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.inspect_logs import remove_inspect_logs, write_inspect_logs
from deltaguard.evaluation.results import Result
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.reports.evaluation import evaluation_card
from deltaguard.reports.records.evaluation import EVALUATION_NAME, SCHEMA_VERSION, EvaluationReport


class _Known(BaseModel):
    """What must be known of a report before another takes its place."""

    schema_version: int
    suite: Annotated[str, Field(max_length=200)]


def require_same_suite(folder: Path, suite: str) -> None:
    """Refuse a folder whose report would be lost: it asked something else, or is of a later release.

    Args:
        folder: of the evaluation, or what becomes one.
        suite: the name of what is asked now.

    Raises:
        DeltaguardError: the report there is of another suite or a later release, or cannot be read.
    """
    path = folder / EVALUATION_NAME
    if not path.exists():
        return
    remedy = "Choose another output folder, or remove this file: answers and scores stay in theirs."
    # An adapter: a schema's own check of versions refuses older ones, too.
    known = read_json(path, TypeAdapter(_Known), remedy=remedy)
    # An older one is what running again is for; a later one may hold what would be lost here.
    if known.schema_version > SCHEMA_VERSION:
        raise DeltaguardError(
            f"{path} has schema version {known.schema_version}, and this release of deltaguard writes "
            f"version {SCHEMA_VERSION}. Choose another output folder, or use the release that wrote it."
        )
    if known.suite != suite:
        raise DeltaguardError(
            f"{folder} holds an evaluation by the suite {known.suite}, and the suite given is {suite}. "
            "Choose another output folder."
        )


def write_report(
    folder: Path, report: EvaluationReport, results: Sequence[Result], *, inspect_logs: bool = False
) -> None:
    """Write `evaluation.json`, and a README.md drawn from it.

    Args:
        folder: of the evaluation.
        report: to be written.
        results: what it was drawn from.
        inspect_logs: whether they are written as logs for Inspect's viewer, too.

    Raises:
        DeltaguardError: a file cannot be written, or logs of an earlier run not be removed.
    """
    # Before the report, which logs of an earlier run may contradict.
    remove_inspect_logs(folder)
    write_atomically(folder / EVALUATION_NAME, report.model_dump_json(indent=2) + "\n")
    write_atomically(folder / "README.md", evaluation_card(report))
    if inspect_logs:
        write_inspect_logs(folder, report, results)
