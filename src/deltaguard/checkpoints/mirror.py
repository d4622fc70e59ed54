"""What an edited checkpoint takes over unchanged: every file that holds no weights."""

from pathlib import Path

from deltaguard.checkpoints.adapter import AdapterCheckpoint
from deltaguard.checkpoints.checkpoint import WeightSource
from deltaguard.checkpoints.companions import adapter_companions, companions
from deltaguard.checkpoints.writer import CheckpointWriter


def bring_along(aligned: WeightSource, finetuned: WeightSource, writer: CheckpointWriter) -> None:
    """Copy every file that is not a weight, and the index; an adapter's folder adds to the aligned model's.

    Args:
        aligned: the aligned checkpoint, whose files complete an adapter's.
        finetuned: the checkpoint that the output mirrors.
        writer: of the output folder.

    Raises:
        DeltaguardError: a file cannot be read or its copy not written, or a link leads out of its folder.
    """
    for name, source in brought_along(aligned, finetuned).items():
        writer.copy(source, name)


def brought_along(aligned: WeightSource, finetuned: WeightSource) -> dict[str, Path]:
    """Find the files that `bring_along` copies.

    Args:
        aligned: as there.
        finetuned: as there.

    Returns:
        Where they lie, by their names in the output folder.

    Raises:
        DeltaguardError: a link leads out of its folder.
    """
    is_adapter = isinstance(finetuned, AdapterCheckpoint)
    if is_adapter:
        found = dict.fromkeys(companions(aligned.folder), aligned.folder)
        found |= dict.fromkeys(adapter_companions(finetuned.folder), finetuned.folder)
    else:
        found = dict.fromkeys(companions(finetuned.folder), finetuned.folder)
    files = {str(path): folder / path for path, folder in found.items()}
    if finetuned.index_name:
        mirrored = aligned if is_adapter else finetuned
        files[finetuned.index_name] = mirrored.folder / finetuned.index_name
    return files
