"""The names that transformers gives to the modules of a model, without its weights."""

from pathlib import Path

from deltaguard.models.loading import empty_model


def module_names(folder: Path) -> tuple[str, ...]:
    """All modules of the causal language model that a checkpoint's configuration describes.

    Args:
        folder: of the checkpoint; its weights are not read.

    Raises:
        DeltaguardError: transformers cannot build the model.
    """
    return tuple(name for name, _ in empty_model(folder, str(folder)).named_modules())
