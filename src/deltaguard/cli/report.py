"""`deltaguard report`, and the page that other verbs draw of what they did."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaguard.cli.sink import Json, OptionalPath, UserPath, emit, tell
from deltaguard.errors import DeltaguardError, MissingPackageError
from deltaguard.reports.records.base import Record


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


def report(
    folder: UserPath,
    /,
    *,
    output: Annotated[OptionalPath, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Draw the result in a folder as one HTML page that fetches nothing.

    Args:
        folder: What `eval`, `bench`, `demo`, `sweep` or `restore` wrote.
        output: The page; `report.html` in the folder if not given.
        json: Print one JSON document and nothing else on stdout.
    """
    drawing = draw_folder(folder, output)
    if drawing.left_out:
        tell(f"Drawn from {drawing.source}; not drawn: {', '.join(drawing.left_out)}.")
    emit(drawing, f"Report: {drawing.page}", as_json=json)


def draw_folder(folder: Path, output: Path | None = None) -> Drawing:
    """Draw the report in a folder as a page that holds everything it shows.

    Of several reports the first of these is drawn: what was measured, before what was done.

    Args:
        folder: of a bench, an evaluation, a demo, a sweep or a restored checkpoint.
        output: where the page goes; `report.html` in the folder if not given.

    Returns:
        What was drawn, and which reports were not.

    Raises:
        DeltaguardError: the folder holds no report or one that cannot be read, the page cannot be written, or
            something that deltaguard did not draw lies in its place.
        MissingPackageError: what charts are drawn with is not installed.

    Example:
        ```python
        draw_folder(Path("bench-quick")).page  # "bench-quick/report.html"
        ```
    """
    from deltaguard.files import read_json
    from deltaguard.models.results import PAGE_NAME, write_page
    from deltaguard.reports.attacks import attacks_page
    from deltaguard.reports.bench import bench_page
    from deltaguard.reports.demo import demo_page
    from deltaguard.reports.evaluation_page import evaluation_page
    from deltaguard.reports.records.attacks import ATTACKS_NAME, AttacksReport
    from deltaguard.reports.records.bench import BENCH_NAME, BenchReport
    from deltaguard.reports.records.demo import DEMO_NAME, DemoReport
    from deltaguard.reports.records.evaluation import EVALUATION_NAME, EvaluationReport
    from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
    from deltaguard.reports.records.sweep import SWEEP_NAME, SweepReport
    from deltaguard.reports.restore import restore_page
    from deltaguard.reports.sweep import sweep_page

    drawn = {
        BENCH_NAME: lambda path: bench_page(read_json(path, BenchReport, remedy=remedy)),
        ATTACKS_NAME: lambda path: attacks_page(read_json(path, AttacksReport, remedy=remedy)),
        EVALUATION_NAME: lambda path: evaluation_page(read_json(path, EvaluationReport, remedy=remedy)),
        DEMO_NAME: lambda path: demo_page(read_json(path, DemoReport, remedy=remedy)),
        SWEEP_NAME: lambda path: sweep_page(read_json(path, SweepReport, remedy=remedy)),
        REPORT_NAME: lambda path: restore_page(read_json(path, RestoreReport, remedy=remedy)),
    }
    remedy = "Draw it with the release that wrote it, or run that again."
    found = [name for name in drawn if (folder / name).is_file()]
    if not found:
        raise DeltaguardError(
            f"There is no report in {folder}: none of {', '.join(drawn)} was found. Name a folder that "
            "`deltaguard eval`, `bench`, `demo`, `sweep` or `restore` wrote."
        )
    source, page = folder / found[0], output or folder / PAGE_NAME
    write_page(page, drawn[found[0]](source))
    return Drawing(source=str(source), page=str(page), bytes=page.stat().st_size, left_out=tuple(found[1:]))


def page_line(folder: Path) -> str:
    """Draw the page of a folder, and say where it is, or what is missing to draw it.

    Raises:
        DeltaguardError: as `draw_folder`.
    """
    try:
        return f"Report: {draw_folder(folder).page}"
    except MissingPackageError as error:
        return str(error)
