"""What an edited checkpoint takes over unchanged: every file that holds no weights."""

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
        DeltaguardError: a file cannot be read or its copy not written.
    """
    is_adapter = isinstance(finetuned, AdapterCheckpoint)
    if is_adapter:
        found = dict.fromkeys(companions(aligned.folder), aligned.folder)
        found |= dict.fromkeys(adapter_companions(finetuned.folder), finetuned.folder)
    else:
        found = dict.fromkeys(companions(finetuned.folder), finetuned.folder)
    for path, folder in found.items():
        writer.copy(folder / path, str(path))
    if finetuned.index_name:
        mirrored = aligned if is_adapter else finetuned
        writer.copy(mirrored.folder / finetuned.index_name, finetuned.index_name)
