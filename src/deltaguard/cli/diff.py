"""`deltaguard diff`."""

from typing import Annotated

from cyclopts import Parameter

from deltaguard.cli.sink import Json, Reference, emit


def diff(
    aligned: Reference,
    finetuned: Reference,
    /,
    *,
    deep: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Show what differs between two checkpoints, by layer and kind, from headers, and besides weights.

    Args:
        aligned: The model before fine-tuning.
        finetuned: The model after it, or a PEFT LoRA adapter folder.
        deep: Read the weights and compare their values.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.reports.diff import diff_table
    from deltaguard.restoration.diff import diff as compare

    report = compare(aligned, finetuned, deep=deep)
    emit(report, diff_table(report), as_json=json)
