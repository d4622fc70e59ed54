"""What a model is, found without loading its weights: so answers that are already there need no model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.models import loading
from deltaguard.models.adapter import base_of, is_adapter, open_model
from deltaguard.models.hub import locate


@dataclass(frozen=True)
class Identity:
    """What answers depend on besides the prompts.

    Attributes:
        fingerprint: hash of the weights, `None` where they cannot be seen.
        chat_template: `None` where it cannot be seen.
        changes: says what happened to the model's files since they were opened, a sentence each.
    """

    fingerprint: str | None
    chat_template: str | None
    changes: Callable[[], list[str]] = field(default=list[str], compare=False)


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
    """Where a model lies; for an adapter, also the model that its configuration names.

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
    """The folder of a model that is no adapter.

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


def identify(reference: str) -> Identity:
    """The weights' fingerprint and the chat template of a local model.

    Args:
        reference: as in `find_folders`.

    Raises:
        DeltaguardError: it cannot be found or read.
    """
    opened = open_model(reference)
    template = load_tokenizer(find_folders(reference)).chat_template
    return Identity(opened.fingerprint(), template, opened.changes)


def load_tokenizer(folders: Folders) -> Any:
    """The tokenizer of a model.

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
