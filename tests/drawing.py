"""What a terminal shows of a table."""

import io

from rich.console import Console


def at_80_columns(table):
    """The text of something drawn for a terminal of that width, without colours."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()
