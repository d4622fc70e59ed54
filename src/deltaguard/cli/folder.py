"""Which report a folder holds, and its page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.results import PAGE_NAME, write_page
from deltaguard.reports.bench_page import bench_page
from deltaguard.reports.evaluation_page import evaluation_page
from deltaguard.reports.html import demo_page, restore_page
from deltaguard.reports.records.base import Record
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport
from deltaguard.reports.records.demo import DEMO_NAME, DemoReport
from deltaguard.reports.records.evaluation import EVALUATION_NAME, EvaluationReport
from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepReport
from deltaguard.reports.sweep_page import sweep_page


@dataclass(frozen=True)
class Drawer:
    """How the report in a file becomes a page."""

    schema: type[BaseModel]
    page: Callable[[Any], str]


DRAWERS: Mapping[str, Drawer] = {
    BENCH_NAME: Drawer(BenchReport, bench_page),
    EVALUATION_NAME: Drawer(EvaluationReport, evaluation_page),
    DEMO_NAME: Drawer(DemoReport, demo_page),
    SWEEP_NAME: Drawer(SweepReport, sweep_page),
    REPORT_NAME: Drawer(RestoreReport, restore_page),
}
"""By file name. Of several in a folder the first is drawn: what was measured, before what was done."""


class Drawing(Record):
    """What `deltaguard report` did.

    Attributes:
        source: the report that was drawn.
        page: the file that was written.
        bytes: its size.
        left_out: other reports in the folder.
    """

    source: str
    page: str
    bytes: int
    left_out: tuple[str, ...]


def draw_folder(folder: Path, output: Path | None = None) -> Drawing:
    """Draw the report in a folder as a page that holds everything it shows.

    Args:
        folder: of an evaluation, a bench, a demo, a sweep or a restored checkpoint.
        output: where the page goes; `report.html` in the folder if not given.

    Returns:
        What was drawn, and which reports were not.

    Raises:
        DeltaguardError: the folder holds no report or one that cannot be read, the page cannot be written, or
            something that deltaguard did not draw lies in its place.

    Example:
        ```python
        draw_folder(Path("bench-quick")).page  # "bench-quick/report.html"
        ```
    """
    found = [name for name in DRAWERS if (folder / name).is_file()]
    if not found:
        raise DeltaguardError(
            f"There is no report in {folder}: none of {', '.join(DRAWERS)} was found. Name a folder that "
            "`deltaguard eval`, `bench`, `demo`, `sweep` or `restore` wrote."
        )
    source, page = folder / found[0], output or folder / PAGE_NAME
    drawer = DRAWERS[found[0]]
    remedy = "Draw it with the release that wrote it, or run that again."
    write_page(page, drawer.page(read_json(source, drawer.schema, remedy=remedy)))
    return Drawing(source=str(source), page=str(page), bytes=page.stat().st_size, left_out=tuple(found[1:]))
