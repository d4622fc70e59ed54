"""What an edited checkpoint takes over unchanged: every file that holds no weights."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.canonical import ConfigFrom, part_of
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.companions import adapter_companions, companions
from deltaguard.models.writer import CheckpointWriter


def model_files(source: WeightSource) -> dict[str, Path]:
    """Find every file of a model that is not a weight; an adapter's folder adds to the aligned model's.

    Args:
        source: a checkpoint, or an adapter.

    Returns:
        Where each lies, by its path in the model's folder.
    """
    if not isinstance(source, AdapterCheckpoint):
        return {str(path): source.folder / path for path in companions(source.folder)}
    own = {str(path): source.folder / path for path in adapter_companions(source.folder)}
    return model_files(source.aligned) | own


def output_files(
    aligned: WeightSource, finetuned: WeightSource, *, config_from: ConfigFrom | None, adapter: bool = False
) -> dict[str, Path]:
    """Find every file that an output has besides its weights, which is what its weights are run with.

    Args:
        aligned: the aligned checkpoint.
        finetuned: the checkpoint that the output mirrors.
        config_from: the model whose configuration, tokenizer and chat template the output has; the
            fine-tuned one's where absent. All other files are the fine-tuned model's.
        adapter: whether the output is loaded over the aligned model, whose configuration it then has.

    Returns:
        Where each lies, by its path in the output.
    """
    own, tuned = model_files(aligned), model_files(finetuned)
    parts = {"config", "tokenizer", "template"} if config_from == "aligned" else set[str]()
    parts |= {"config"} if adapter else set[str]()
    kept = {path: file for path, file in tuned.items() if part_of(path) not in parts}
    return kept | {path: file for path, file in own.items() if part_of(path) in parts}


@contextmanager
def loadable(files: Mapping[str, Path]) -> Generator[Path]:
    """Give a folder from which transformers loads configuration and tokenizer as from an output's.

    Args:
        files: of the output, by their paths in it.

    Yields:
        The folder that all of them lie in; where there are several, a temporary one with links.
    """
    deciding = {path: file for path, file in files.items() if part_of(path) is not None}
    homes = {file.parents[len(Path(path).parts) - 1] for path, file in deciding.items()}
    if len(homes) == 1:
        yield homes.pop()
        return
    with TemporaryDirectory(prefix="deltaguard-") as folder:
        for path, file in deciding.items():
            link = Path(folder) / path
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.absolute())
        yield Path(folder)


def bring_along(
    aligned: WeightSource,
    finetuned: WeightSource,
    writer: CheckpointWriter,
    *,
    config_from: ConfigFrom | None = None,
) -> None:
    """Copy every file that is not a weight, and the index.

    Args:
        aligned: the aligned checkpoint, whose files complete an adapter's.
        finetuned: the checkpoint that the output mirrors.
        writer: of the output folder.
        config_from: as in `output_files`.

    Raises:
        DeltaguardError: a file cannot be read or its copy not written, or a link leads out of its folder.
    """
    for name, source in brought_along(aligned, finetuned, config_from=config_from).items():
        writer.copy(source, name)


def brought_along(
    aligned: WeightSource, finetuned: WeightSource, *, config_from: ConfigFrom | None
) -> dict[str, Path]:
    """Find the files that `bring_along` copies.

    Args:
        aligned: as there.
        finetuned: as there.
        config_from: as there.

    Returns:
        Where they lie, by their names in the output folder.

    Raises:
        DeltaguardError: a link leads out of its folder.
    """
    files = output_files(aligned, finetuned, config_from=config_from)
    if finetuned.index_name:
        mirrored = aligned if isinstance(finetuned, AdapterCheckpoint) else finetuned
        files[finetuned.index_name] = mirrored.folder / finetuned.index_name
    return files


def beside_adapter(
    aligned: WeightSource, finetuned: WeightSource, *, config_from: ConfigFrom | None
) -> dict[str, Path]:
    """Find the files that come along with an adapter: those that describe neither a model nor an adapter.

    Args:
        aligned: the aligned checkpoint, over which the adapter is loaded.
        finetuned: the checkpoint that was restored.
        config_from: as in `output_files`.

    Returns:
        Where they lie, by their names in the output folder.

    Raises:
        DeltaguardError: a link leads out of its folder.
    """
    files = output_files(aligned, finetuned, config_from=config_from, adapter=True)
    return {name: file for name, file in files.items() if part_of(name) != "config"}
