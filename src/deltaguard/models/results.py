"""Folders and pages for results: new, empty or deltaguard's own, and never a model that is an input."""

import contextlib
import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.models.admission import refuse_inputs
from deltaguard.models.durable import explained, lock_folder, partial_file, write_atomically
from deltaguard.models.hub import is_local
from deltaguard.models.layout import ADAPTER_CONFIG, CONFIG_FILE
from deltaguard.reports.records.attacks import ATTACKS_NAME
from deltaguard.reports.records.bench import BENCH_NAME
from deltaguard.reports.records.demo import DEMO_NAME
from deltaguard.reports.records.evaluation import EVALUATION_NAME
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.reports.records.sweep import SWEEP_NAME

PAGE_NAME = "report.html"
"""The page that is drawn in a folder of results."""

SECONDS_NAME = "seconds.json"
"""The file in an evaluation's folder that holds how long the stages took so far."""

SETTINGS_NAME = "settings.json"
"""The file in a bench's folder that holds what all its runs have in common."""

_SHOWN = 3
_PAGE_BEGINS = 4096
_GENERATOR = b'<meta name="generator" content="deltaguard'


@dataclass(frozen=True)
class FolderKind:
    """What a verb writes into its output folder.

    Attributes:
        verb: the verb.
        marks: files by which a folder is known as its own: one of them is there before anything else is.
            There are none where a run never goes on in a folder that another has begun.
        draws: whether the run draws `report.html`.
    """

    verb: str
    marks: tuple[str, ...]
    draws: bool = False


EVALUATION = FolderKind("eval", (EVALUATION_NAME, SECONDS_NAME))
BENCH = FolderKind("bench", (BENCH_NAME, ATTACKS_NAME, SETTINGS_NAME))
SWEEP = FolderKind("sweep", (SWEEP_NAME,), draws=True)
DEMO = FolderKind("demo", (), draws=True)

# A bench keeps seconds too.
_OF_OTHERS = (
    *(CONFIG_FILE, ADAPTER_CONFIG, "curvature.json"),
    *(REPORT_NAME, DEMO_NAME, BENCH_NAME, ATTACKS_NAME, SETTINGS_NAME, EVALUATION_NAME, SWEEP_NAME),
)


@contextlib.contextmanager
def results_folder(
    folder: Path, results: FolderKind, *, inputs: Iterable[str | Path] = ()
) -> Generator[None, None, None]:
    """Make a folder for results, or take one of an earlier run, and keep other processes out of it.

    Where the block fails and leaves nothing in a folder that was made, that is removed.

    Args:
        folder: the output folder; it must be new, empty, or of the same verb.
        results: what will be written.
        inputs: models, which must neither be, contain, nor lie in the folder; those on the Hub do not matter.

    Raises:
        DeltaguardError: the folder holds something else, is an input, cannot be made, or another process
            works in it.
    """
    refuse_inputs(folder, [expanded(each) for each in inputs if is_local(each)])
    with explained(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        with explained(folder):
            _refuse_foreign(folder, results)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        os.close(lock)


def write_page(path: Path, text: str) -> None:
    """Write an HTML page, in the place of none or of one that deltaguard drew.

    Args:
        path: the page.
        text: all of it.

    Raises:
        DeltaguardError: something else lies there, or the page cannot be written.
    """
    _refuse_foreign_page(path)
    write_atomically(path, text)


def _refuse_foreign_page(path: Path) -> None:
    """Refuse to draw a page where something lies that deltaguard did not draw."""
    with explained(path):
        if not os.path.lexists(path):
            return
        if path.is_file():
            with path.open("rb") as file:
                if _GENERATOR in file.read(_PAGE_BEGINS):
                    return
    raise DeltaguardError(
        f"{path} is no page that deltaguard drew, so it is not replaced. Move it away, or name another file."
    )


def _refuse_foreign(folder: Path, results: FolderKind) -> None:
    """Refuse a folder that is neither empty nor known by the verb's own files."""
    # A run that was killed while it wrote its first file left that half-written.
    begun = {partial_file(folder / mark).name for mark in (*results.marks, PAGE_NAME)}
    found = sorted(path.name for path in folder.iterdir() if path.name not in begun)
    others = [name for name in found if name in _OF_OTHERS and name not in results.marks]
    is_own = any((folder / mark).is_file() for mark in results.marks)
    if found and (others or not is_own):
        named = others or found
        shown = ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
        state = "is not empty"
        if results.marks:
            state = f"is neither empty nor that of an earlier `deltaguard {results.verb}`"
        raise DeltaguardError(f"The output folder {folder} {state}: it holds {shown}. Choose another one.")
    if results.draws:
        _refuse_foreign_page(folder / PAGE_NAME)
