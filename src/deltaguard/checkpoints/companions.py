"""The files of a checkpoint that are not weights: tokenizer, chat template, configuration, licence."""

from collections.abc import Iterator
from pathlib import Path

from deltaguard.report.restore import REPORT_NAME

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
_REPLACED = (REPORT_NAME, "README.md")
_TRAINING_FOLDERS = ("checkpoint-", "global_step", "runs", ".")


def companions(folder: Path) -> Iterator[Path]:
    """Paths, relative to the folder, of every file that belongs to the model and is not a weight.

    Weights, optimizer state and files of training runs are left out, and so are a model card and a
    report, which the restored checkpoint has of its own.

    Args:
        folder: a local checkpoint folder.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(_TRAINING_FOLDERS) for part in relative.parts):
            continue
        if path.is_file() and not _is_left_out(path.name):
            yield relative


def adapter_companions(folder: Path) -> Iterator[Path]:
    """As `companions`, without the files that describe the adapter itself."""
    return (path for path in companions(folder) if not path.name.startswith("adapter_"))


def _is_left_out(name: str) -> bool:
    return name.endswith(_WEIGHTS) or name in (*_TRAINING_STATE, *_REPLACED)
