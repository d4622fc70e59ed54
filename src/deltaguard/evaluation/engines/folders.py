"""Where the parts of a model lie, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.models import loading
from deltaguard.models.adapter import is_adapter, model_of, open_model
from deltaguard.models.hub import locate
from deltaguard.models.mirror import loadable


@dataclass(frozen=True)
class Folders:
    """Where the parts of a model lie.

    Attributes:
        model: weights and configuration.
        adapter: a LoRA adapter over it, or `None`.
    """

    model: Path
    adapter: Path | None


def find_folders(reference: str) -> Folders:
    """Find where a model lies; for an adapter, also the model that its configuration names.

    Args:
        reference: a folder, a Hub id, or `id@revision`, of a model or of a PEFT adapter.

    Raises:
        DeltaguardError: it cannot be found, or an adapter does not say what it belongs to.
    """
    folder = locate(reference)
    if not is_adapter(reference):
        return Folders(folder, None)
    with model_of(reference) as base:
        return Folders(locate(base), folder)


def whole_model(reference: str) -> Path:
    """Find the folder of a model that is no adapter.

    Args:
        reference: as in `find_folders`.

    Raises:
        DeltaguardError: it cannot be found, or is an adapter.
    """
    folders = find_folders(reference)
    if folders.adapter is not None:
        raise DeltaguardError(
            f"{reference} is an adapter, and vLLM, a second attack and the harness need a whole model: merge "
            "it first (PEFT's merge_and_unload)."
        )
    return folders.model


def load_tokenizer(reference: str) -> Any:
    """Load the tokenizer of a model; of an adapter its own files, and its model's in the place of others.

    Raises:
        DeltaguardError: transformers cannot load it, or it has no chat template.
    """
    with loadable(open_model(reference).files()) as folder:
        tokenizer = loading.load_tokenizer(folder, reference)
    if not isinstance(tokenizer.chat_template, str):
        raise DeltaguardError(
            f"The tokenizer of {reference} has no single chat template, so prompts cannot be put to the "
            "model the way it was aligned. Save one chat_template.jinja next to it."
        )
    return tokenizer
