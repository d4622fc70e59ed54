"""Reports of several runs in one small file, each under what it is of in a few words."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.outcome import without_the_users_folders
from deltaguard.reports.records.check import CheckReport
from deltaguard.reports.records.restore import RestoreReport

ReportT = TypeVar("ReportT", RestoreReport, CheckReport)


class Run(BaseModel, Generic[ReportT]):
    """One run's report, and of which fine-tune it is in a few words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finetune: str
    report: ReportT


class Runs(BaseModel, Generic[ReportT]):
    """A file of such reports in `docs/results`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[Run[ReportT], ...]


def collect(
    kind: type[Runs[ReportT]],
    read: Callable[[Path], ReportT],
    arguments: Sequence[str] | None,
    *,
    program: str,
    about: str | None,
) -> int:
    """Collect reports, without the folders above what they name, by a command line `NAME=PATH ... -o FILE`.

    Args:
        kind: of file.
        read: takes a report from a path.
        arguments: of the command line, `sys.argv` where absent.
        program: as its help names it.
        about: what its help says.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("runs", nargs="+", metavar="NAME=PATH")
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    named = [run.partition("=") for run in chosen.runs]
    runs = [
        {"finetune": name, "report": without_the_users_folders(read(Path(path)))} for name, _, path in named
    ]
    text = kind.model_validate({"runs": runs}).model_dump_json(indent=1)
    chosen.output.write_text(text + "\n", encoding="utf-8")
    return 0
