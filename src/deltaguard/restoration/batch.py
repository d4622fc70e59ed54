"""Several fine-tunes of one aligned model: where each goes, and that one which fails does not lose others."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import expanded
from deltaguard.models.admission import refuse_inputs
from deltaguard.models.canonical import CONFIG
from deltaguard.models.hub import is_local
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.names import name_problem
from deltaguard.reports.records.batch import BatchReport, BatchRow
from deltaguard.restoration.aligned import SharedInputError

Outputs = Mapping[str, Path]
"""Fine-tunes, as the user called them, and the folder for each."""


def outputs_of(finetuned: Sequence[str], folder: Path) -> Outputs:
    """Give each fine-tune a folder of its own name: that of its folder, or of its Hub id after the slash.

    A revision is no part of the name, and capitals do not tell names apart, since on some disks they do not.

    Args:
        finetuned: local folders, Hub ids, or `id@revision`.
        folder: holds them all.

    Raises:
        DeltaguardError: two have one name, a name cannot be one, or an output would lie in the folder of a
            model.

    Example:
        >>> outputs_of(["runs/one/", "someone/two@main"], Path("out"))["someone/two@main"].as_posix()
        'out/two'
    """
    folder = expanded(folder)
    if any((folder / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        raise DeltaguardError(
            f"{folder} is the folder of a model: several restored ones get a folder each in one of their own."
        )
    names = [_name(reference) for reference in finetuned]
    problems = [problem for name in names if (problem := name_problem(name))]
    alike: dict[str, list[str]] = {}
    for reference, name in zip(finetuned, names, strict=True):
        alike.setdefault(name.casefold(), []).append(reference)
    problems += [f"{', '.join(each)} would share one" for each in alike.values() if len(each) > 1]
    if problems:
        title = "Each restored model is named as its fine-tune, and these names do not serve"
        raise DeltaguardError(f"{listed(title, problems)}\nRestore these apart, into folders that you name.")
    inputs = [expanded(reference) for reference in finetuned if is_local(reference)]
    outputs = {reference: folder / name for reference, name in zip(finetuned, names, strict=True)}
    for output in outputs.values():
        refuse_inputs(output, inputs)
    return outputs


def each_of(
    outputs: Outputs, work: Callable[[str, Path], BatchRow], on_failure: Callable[[str, str], None]
) -> BatchReport:
    """Do something with each fine-tune, in the order given; the others go on where one fails.

    Args:
        outputs: the fine-tunes.
        work: makes the row of one.
        on_failure: told which failed, and why.

    Raises:
        SharedInputError: none can be restored. Where that comes out after the first, all that are left fail.
    """
    rows: list[BatchRow] = []
    broken: SharedInputError | None = None
    for finetuned, output in outputs.items():
        try:
            if broken is not None:
                raise broken
            rows.append(work(finetuned, output))
        except (DeltaguardError, OSError) as error:
            if isinstance(error, SharedInputError):
                if not rows:
                    raise
                broken = error
            on_failure(finetuned, str(error))
            rows.append(BatchRow(finetuned=finetuned, output=str(output), error=str(error)))
    return BatchReport(rows=tuple(rows))


def _name(reference: str) -> str:
    if is_local(reference):
        # A link keeps its own name.
        return Path(os.path.abspath(expanded(reference))).name  # noqa: PTH100
    return reference.partition("@")[0].rpartition("/")[2]
