"""Where the parts of a model lie, an adapter's base and the tokenizer among them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.models import loading
from deltaguard.models.adapter import base_of, is_adapter
from deltaguard.models.hub import locate


@dataclass(frozen=True)
class Folders:
    """Where the parts of a model lie.

    Attributes:
        model: weights and configuration.
        adapter: a LoRA adapter over it, or `None`.
        tokenizer: the adapter's own where it brings one.
    """

    model: Path
    adapter: Path | None
    tokenizer: Path


def find_folders(reference: str) -> Folders:
    """Find where a model lies; for an adapter, also the model that its configuration names.

    Args:
        reference: a folder, a Hub id, or `id@revision`, of a model or of a PEFT adapter.

    Raises:
        DeltaguardError: it cannot be found, or an adapter does not say what it belongs to.
    """
    folder = locate(reference)
    if not is_adapter(reference):
        return Folders(folder, None, folder)
    model = locate(base_of(reference))
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Folders(model, folder, folder if has_tokenizer else model)


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


def load_tokenizer(folders: Folders) -> Any:
    """Load the tokenizer of a model.

    Raises:
        DeltaguardError: transformers cannot load it, or it has no chat template.
    """
    tokenizer = loading.load_tokenizer(folders.tokenizer, str(folders.tokenizer))
    if not isinstance(tokenizer.chat_template, str):
        raise DeltaguardError(
            f"The tokenizer in {folders.tokenizer} has no single chat template, so prompts cannot be put to "
            "the model the way it was aligned. Save one chat_template.jinja next to it."
        )
    return tokenizer
