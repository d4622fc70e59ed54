"""A LoRA adapter merged into a model by PEFT, which is told modules by their names alone."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.adapter import open_adapter_weights
from deltaguard.models.checkpoint import name_map
from deltaguard.models.families import stored_in_out
from deltaguard.models.loading import foreign
from deltaguard.models.lora import changed_modules
from deltaguard.models.lora_config import LoraConfig, Scaling, find_scalings, read_lora_config


def merge_adapter(model: Any, folder: Path, reference: str) -> Any:
    """Merge an adapter into a model.

    PEFT would match the patterns of `adapter_config.json` against the names of all modules, for as long as
    that takes; so it is given a configuration that names the modules of the adapter's tensors, one by one.

    Args:
        model: a transformers causal language model; it is changed.
        folder: of the adapter.
        reference: what the user called it, for messages.

    Returns:
        The merged model.

    Raises:
        DeltaguardError: the adapter is no plain LoRA, does not fit the model, or PEFT cannot load it.
    """
    from peft import PeftModel

    lora = read_lora_config(folder, reference)
    found = changed_modules(open_adapter_weights(folder)[1])
    names = name_map(
        [*found.adapted, *found.replaced], [name for name, _ in model.named_modules(remove_duplicate=False)]
    )
    absent = [name for name in (*found.adapted, *found.replaced) if name not in names]
    if absent:
        raise DeltaguardError(
            listed(f"The adapter {reference} changes modules that its model has not", absent)
        )
    scalings = find_scalings(lora, found.adapted, reference)
    adapted = {names[module]: scaling for module, scaling in scalings.items()}
    config = _literal(
        lora,
        adapted,
        modules_to_save=[names[module] for module in found.replaced] or None,
        fan_in_fan_out=any(stored_in_out(model.config.to_dict(), f"{name}.weight") for name in adapted),
    )
    with foreign(f"peft cannot load {reference}"):
        merged: Any = PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    return merged


def _literal(lora: LoraConfig, adapted: Mapping[str, Scaling], **others: Any) -> Any:
    """PEFT's configuration for modules named one by one."""
    import peft

    ranks = {_exactly(n): each.rank for n, each in adapted.items() if each.rank != lora.r}
    alphas = {_exactly(n): each.alpha for n, each in adapted.items() if each.alpha != lora.lora_alpha}
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]  # any number, in fact
        use_rslora=lora.use_rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=list(adapted),
        inference_mode=True,
        **others,
    )


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"
