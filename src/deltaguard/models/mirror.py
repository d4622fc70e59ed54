"""The files of a model that are not weights, and which of them come along into an output."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.canonical import ConfigFrom, part_of
from deltaguard.models.names import link_target
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME

if TYPE_CHECKING:
    from deltaguard.models.checkpoint import WeightSource

_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    *(".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".ot", ".nemo", ".pdparams"),
    *(".engine", ".mlmodel", ".mlpackage", ".llamafile"),
    # Shards of torch's distributed checkpoints; and pickles, which loading would run.
    *(".distcp", ".pkl", ".pickle"),
)
_TRAINING_STATE = ("trainer_state.json", "training_args.json", "scheduler.json")
_REPLACED = (REPORT_NAME, CARD_NAME)
_TRAINING_FOLDERS = ("checkpoint-", "global_step", "optimizer_", "pytorch_model_fsdp", "runs", "wandb", ".")


def companions(folder: Path) -> list[Path]:
    """List every file that belongs to the model and is not a weight, by its path within the folder.

    Weights, optimizer state and files of training runs are left out, and so are a model card and a
    report, which the restored checkpoint has of its own.

    Args:
        folder: a local checkpoint folder.

    Raises:
        DeltaguardError: links lead out of the folder, so that files of others would be copied. All are named.
    """
    found = [path for path in sorted(folder.rglob("*")) if _belongs(path.relative_to(folder))]
    refuse_links_out(folder, found)
    return [path.relative_to(folder) for path in found if path.is_file()]


def adapter_companions(folder: Path) -> list[Path]:
    """List what `companions` does, without the files that describe the adapter itself."""
    return [path for path in companions(folder) if not path.name.startswith("adapter_")]


def refuse_links_out(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links in a model's folder that lead out of it, or nowhere.

    Args:
        folder: the model's folder; of a snapshot in a Hub cache, `blobs` beside it is understood.
        paths: files in it.

    Raises:
        DeltaguardError: all such links are named, with their targets.
    """
    problems: list[str] = []
    for path in paths:
        target = link_target(folder, path)
        if target is not None:
            problems.append(f"{path.relative_to(folder)} is a link to {target}")
        elif path.is_symlink() and not path.exists():
            problems.append(f"{path.relative_to(folder)} is a link to {path.readlink()}, which is not there")
    if problems:
        raise DeltaguardError(
            f"{listed(f'{folder} holds links that lead out of it or nowhere', problems)}\n"
            "Put the file itself in the place of a link that you trust, and remove the others."
        )


def output_files(
    aligned: "WeightSource",
    finetuned: "WeightSource",
    *,
    config_from: ConfigFrom | None,
    adapter: bool = False,
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
    own, tuned = aligned.files(), finetuned.files()
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


def checkpoint_files(
    aligned: "WeightSource", finetuned: "WeightSource", *, config_from: ConfigFrom | None
) -> dict[str, Path]:
    """Find the files that are copied into an output checkpoint: `output_files`, and the index."""
    files = output_files(aligned, finetuned, config_from=config_from)
    index = finetuned.index_file()
    return files if index is None else {**files, index.name: index}


def adapter_files(
    aligned: "WeightSource", finetuned: "WeightSource", *, config_from: ConfigFrom | None
) -> dict[str, Path]:
    """Find the files that are copied beside an output adapter: those that describe neither it nor a model."""
    files = output_files(aligned, finetuned, config_from=config_from, adapter=True)
    return {name: file for name, file in files.items() if part_of(name) != "config"}


def _belongs(path: Path) -> bool:
    if any(part.startswith(_TRAINING_FOLDERS) for part in path.parts):
        return False
    if any(part.endswith(_WEIGHTS) for part in path.parts):
        return False
    return path.name not in (*_TRAINING_STATE, *_REPLACED)
