"""Runs a notebook from top to bottom with other parameters, and prints what its cells print.

    python -m tools.notebook examples/restore.ipynb MODEL=demo/aligned OUTPUT=notebook

The cell with the tag `parameters` says what there is; values are written as in Python, or as plain text. The
notebook itself is left as it is.
"""

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TAG = "parameters"


def run_notebook(
    path: Path, parameters: Mapping[str, Any], *, folder: Path, timeout: int | None = None
) -> list[str]:
    """Run all cells of a notebook in one new kernel.

    Args:
        path: the notebook.
        parameters: values by name; each must be assigned in the cell with the tag.
        folder: where it runs.
        timeout: seconds that one cell may take; None for any time.

    Returns:
        What each code cell printed.

    Raises:
        ValueError: there is not one cell with the tag, or it assigns no such parameter.
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"{path} has {len(tagged)} cells with the tag {TAG!r}; it must have one.")
    known = _assigned(tagged[0].source)
    if unknown := sorted(parameters.keys() - known):
        raise ValueError(f"{path} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    tagged[0].source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    return [_printed(cell) for cell in notebook.cells if cell.cell_type == "code"]


def _assigned(source: str) -> set[str]:
    targets = [
        target for each in ast.parse(source).body if isinstance(each, ast.Assign) for target in each.targets
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _printed(cell: Any) -> str:
    streams = [
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    ]
    return "".join(streams)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: `sys.argv` where absent.

    Returns:
        The exit code: 1 where a cell failed.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.notebook", description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE")
    chosen = parser.parse_args(arguments)
    try:
        given = dict(each.split("=", 1) for each in chosen.parameters)
        printed = run_notebook(chosen.notebook, {n: _value(v) for n, v in given.items()}, folder=Path.cwd())
    except (ValueError, CellExecutionError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(filter(None, printed)))
    return 0


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
