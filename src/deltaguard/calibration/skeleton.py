"""The names that transformers gives to the modules of a model, without its weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaguard.errors import DeltaguardError


def module_names(folder: Path) -> tuple[str, ...]:
    """All modules of the causal language model that a checkpoint's configuration describes.

    Args:
        folder: of the checkpoint; its weights are not read.

    Raises:
        DeltaguardError: transformers cannot build the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise DeltaguardError(f"transformers cannot build the model of {folder}: {error}") from error
    return tuple(name for name, _ in model.named_modules())
