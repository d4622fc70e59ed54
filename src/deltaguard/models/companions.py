"""The files of a checkpoint that are not weights: tokenizer, chat template, configuration, licence."""

from collections.abc import Iterable
from pathlib import Path

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.names import link_target
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME

_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".npz",
    ".tflite",
    ".ckpt",
)
_TRAINING_STATE = ("trainer_state.json", "training_args.json", "scheduler.json")
_REPLACED = (REPORT_NAME, CARD_NAME)
_TRAINING_FOLDERS = ("checkpoint-", "global_step", "runs", ".")


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


def _belongs(path: Path) -> bool:
    if any(part.startswith(_TRAINING_FOLDERS) for part in path.parts):
        return False
    return not path.name.endswith(_WEIGHTS) and path.name not in (*_TRAINING_STATE, *_REPLACED)
