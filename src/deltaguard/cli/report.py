"""`deltaguard report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaguard.cli.sink import Json, emit, tell


def report(
    folder: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Draw the result in a folder as one HTML page that fetches nothing.

    Args:
        folder: What `eval`, `bench`, `demo`, `sweep` or `restore` wrote.
        output: The page; `report.html` in the folder if not given.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.cli.folder import draw_folder

    drawing = draw_folder(folder, output)
    if drawing.left_out:
        tell(f"Drawn from {drawing.source}; not drawn: {', '.join(drawing.left_out)}.")
    emit(drawing, f"Report: {drawing.page}", as_json=json)
