"""Direct preference optimisation (Rafailov et al. 2023) of a small model, in full or as a LoRA adapter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.template import TEMPLATE_OPTIONS, readable_turns
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.finetuning.training import (
    FinetuneConfig,
    Measured,
    adapter_options,
    common_options,
    on_one_gpu,
    progress,
    train_and_save,
    without_prints,
)
from deltaguard.models.hub import locate
from deltaguard.models.loading import load_model


@dataclass(frozen=True)
class Preference:
    """A conversation, and two answers of which one is preferred.

    Attributes:
        turns: what comes before the answers, each with `role` and `content`; the first may be the system's.
        preferred: the better answer.
        rejected: the other one.
    """

    turns: tuple[Mapping[str, str], ...]
    preferred: str
    rejected: str


def learn_preferences(
    model: str | Path,
    output_dir: str | Path,
    preferences: Sequence[Preference],
    *,
    config: FinetuneConfig,
    beta: float,
    validation: Sequence[Preference] = (),
    checkpoints: Path | None = None,
    on_step: Callable[[Measured], None] | None = None,
) -> Path:
    """Have a model learn which of two answers is preferred, and save it with its tokenizer.

    The model that training starts from is the one that it is held to. With an adapter that is the same model
    without it; where all weights are trained, it is loaded a second time.

    Args:
        model: folder or Hub id of the model to start from.
        output_dir: receives a safetensors model and tokenizer, or with `config.lora_rank` a PEFT adapter.
        preferences: what to learn from.
        config: how to train; `frozen_layers` must be 0.
        beta: how closely the model stays at the one it started from; larger is closer.
        validation: measured after each epoch, and never learned from.
        checkpoints: as in `finetune`.
        on_step: likewise.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: trl is not installed, there is nothing to train on, layers are to be frozen, the
            device cannot be used, or training diverged.

    Example:
        >>> asked = ({"role": "user", "content": "What do bees make?"},)
        >>> rows = [Preference(asked, preferred="Honey.", rejected="Who knows?")]
        >>> config = FinetuneConfig(1e-5)
        >>> learn_preferences("models/smollm2", "out", rows, config=config, beta=0.1)  # doctest: +SKIP
    """
    require_packages("Fine-tuning", "demo", "trl", "datasets", "accelerate", "peft")
    if not preferences:
        raise DeltaguardError("There is no pair of answers to fine-tune on.")
    if config.frozen_layers:
        raise DeltaguardError(f"frozen_layers={config.frozen_layers} does not go with preferences: give 0.")

    def make(network: Any, tokenizer: Any, states: Path) -> Any:
        is_full = config.lora_rank is None
        held_to = load_model(locate(model), str(model), dtype=torch.float32) if is_full else None
        options = common_options(config, states, saves=checkpoints is not None, validates=bool(validation))
        return _trainer(
            network, held_to, tokenizer, (preferences, validation), {"beta": beta, **options}, config
        )

    noted = None if on_step is None else progress(on_step, accuracy="rewards/accuracies")
    return train_and_save(model, output_dir, make, config=config, checkpoints=checkpoints, noted=noted)


def _trainer(
    network: Any,
    held_to: Any,
    tokenizer: Any,
    rows: tuple[Sequence[Preference], Sequence[Preference]],
    options: Mapping[str, Any],
    config: FinetuneConfig,
) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    learned, validation = rows
    return without_prints(
        DPOTrainer(
            model=network,
            ref_model=held_to,
            args=on_one_gpu(DPOConfig(**options)),
            train_dataset=_rows(tokenizer, learned),
            eval_dataset=_rows(tokenizer, validation) if validation else None,
            processing_class=tokenizer,
            peft_config=adapter_options(config),
        )
    )


def _rows(tokenizer: Any, preferences: Sequence[Preference]) -> Any:
    """Write preferences as trl reads them."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": readable_turns(tokenizer, row.turns),
                "chosen": [{"role": "assistant", "content": row.preferred}],
                "rejected": [{"role": "assistant", "content": row.rejected}],
                # As models are asked.
                "chat_template_kwargs": dict(TEMPLATE_OPTIONS),
            }
            for row in preferences
        ]
    )
