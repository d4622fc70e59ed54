"""Direct preference optimisation (Rafailov et al. 2023) of a small model, in full or as a LoRA adapter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.template import readable_turns
from deltaguard.chat.tokens import encode_answer
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.finetuning.training import (
    FinetuneConfig,
    Measured,
    Rows,
    make_trainer,
    progress,
    train_and_save,
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
        DeltaguardError: trl is not installed, there is nothing to train on, the chat template fails on a
            conversation, layers are to be frozen, the device cannot be used, or training diverged.

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

    def write(tokenizer: Any, longest: int) -> tuple[Rows, Rows]:
        return _rows(tokenizer, preferences, longest), _rows(tokenizer, validation, longest)

    is_full = config.lora_rank is None
    held_to = load_model(locate(model), str(model), dtype=torch.float32) if is_full else None
    return train_and_save(
        model,
        output_dir,
        write=write,
        make=partial(_trainer, config, held_to, beta),
        config=config,
        checkpoints=checkpoints,
        noted=None if on_step is None else progress(on_step, accuracy="rewards/accuracies"),
    )


def _trainer(
    config: FinetuneConfig,
    held_to: Any,
    beta: float,
    network: Any,
    tokenizer: Any,
    rows: tuple[Rows, Rows],
    options: Mapping[str, Any],
) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenTrainer(DPOTrainer):
        """trl's trainer over rows that are tokens already, as they are left by its own preparation."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return make_trainer(
        TokenTrainer, DPOConfig(beta=beta, **options), network, tokenizer, rows, config, ref_model=held_to
    )


def _rows(tokenizer: Any, preferences: Sequence[Preference], longest: int) -> Rows:
    """Write preferences as tokens, which trl takes as they are, without those too long for both answers."""
    rows: list[dict[str, list[int]]] = []
    for row in preferences:
        turns = readable_turns(tokenizer, row.turns)
        better, worse = (
            encode_answer(tokenizer, turns, answer, max_length=longest)
            for answer in (row.preferred, row.rejected)
        )
        if better.has_response and worse.has_response:
            asked = list(better.ids[: better.prompt_length])
            chosen, rejected = (list(each.ids[each.prompt_length :]) for each in (better, worse))
            rows.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows
