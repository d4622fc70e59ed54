"""Supervised fine-tuning of a small model, in full or as a LoRA adapter, through trl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.conversations import Conversation, require_responses
from deltaguard.chat.template import messages, readable_turns
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

_NOT_LEARNED = -100
"""The label of a token that carries no loss, in all of transformers."""


@dataclass(frozen=True)
class Dialogue:
    """A conversation of any number of turns, and the answer that is learned from it.

    Attributes:
        turns: what comes before the answer, each with `role` and `content`; the first may be the system's.
        answer: what the assistant says then.
    """

    turns: tuple[Mapping[str, str], ...]
    answer: str


def finetune(
    model: str | Path,
    output_dir: str | Path,
    conversations: Sequence[Conversation | Dialogue],
    *,
    config: FinetuneConfig,
    validation: Sequence[Conversation | Dialogue] = (),
    checkpoints: Path | None = None,
    on_step: Callable[[Measured], None] | None = None,
) -> Path:
    """Fine-tune a model on the responses of conversations, and save it with its tokenizer.

    The weights are in float32; products are in bfloat16 where the device multiplies in it (`served_dtype`).
    Only the tokens of the responses carry a loss. Conversations are put through the model's chat template,
    system message included. Nothing but the result, and checkpoints where they are asked for, is written.

    Args:
        model: folder or Hub id of the model to start from.
        output_dir: receives a safetensors model and tokenizer, or with `config.lora_rank` a PEFT adapter.
        conversations: all with responses.
        config: how to train.
        validation: measured after each epoch, and never learned from; what is too long for an answer is not.
        checkpoints: a folder that receives the state of training after each tenth of it; training that was
            interrupted goes on from the last whole one there. It belongs to this training alone.
        on_step: told what each step, and each look at the validation data, measured.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: trl or datasets is not installed, there is nothing to train on, a response is
            missing, the chat template fails on a conversation, all prompts are too long, more blocks are to
            be frozen than there are, the device cannot be used, or training diverged.

    Example:
        >>> pairs = [Conversation("What do bees make?", response="Honey.")]
        >>> finetune("models/smollm2", "out", pairs, config=FinetuneConfig(1e-4))  # doctest: +SKIP
    """
    require_packages("Fine-tuning", "demo", "trl", "datasets", "accelerate", "peft")
    if not conversations:
        raise DeltaguardError("There is no conversation to fine-tune on.")
    require_responses([row for row in conversations if isinstance(row, Conversation)], "to learn from")

    def write(tokenizer: Any, longest: int) -> tuple[Rows, Rows]:
        return _rows(tokenizer, conversations, longest), _rows(tokenizer, validation, longest)

    return train_and_save(
        model,
        output_dir,
        write=write,
        make=partial(_trainer, config),
        config=config,
        checkpoints=checkpoints,
        noted=None if on_step is None else progress(on_step, accuracy="mean_token_accuracy"),
    )


def _rows(tokenizer: Any, conversations: Sequence[Conversation | Dialogue], longest: int) -> Rows:
    """Write conversations as tokens, which trl takes as they are, without those too long for an answer."""
    rows: list[dict[str, list[int]]] = []
    for row in conversations:
        if isinstance(row, Dialogue):
            turns, answer = readable_turns(tokenizer, row.turns), row.answer
        else:
            turns, answer = messages(tokenizer, row), row.response or ""
        text = encode_answer(tokenizer, turns, answer, max_length=longest)
        if text.has_response:
            labels = [*[_NOT_LEARNED] * text.prompt_length, *text.ids[text.prompt_length :]]
            rows.append({"input_ids": list(text.ids), "labels": labels})
    return rows


def _trainer(
    config: FinetuneConfig,
    network: Any,
    tokenizer: Any,
    rows: tuple[Rows, Rows],
    options: Mapping[str, Any],
) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class CompletionTrainer(_CompletionLoss, SFTTrainer):
        """trl's trainer with a loss that costs only what the completions cost."""

    return make_trainer(CompletionTrainer, SFTConfig(**options), network, tokenizer, rows, config)


class _CompletionLoss:
    """The mean cross-entropy of the completions, computed without the logits of the prompts.

    On a CPU, trl puts every position through the output layer, and again in the backward pass: with a large
    vocabulary and short answers that takes as long as the rest of the model.
    """

    _metrics: dict[str, dict[str, list[float]]]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT002  # trl's
        num_items_in_batch: Any = None,  # noqa: ARG002  # trl's
    ) -> Any:
        """See the class; `inputs` holds `input_ids`, `attention_mask` and `labels`, each (batch, tokens)."""
        labels = inputs["labels"][:, 1:]
        kept = (labels != _NOT_LEARNED).any(dim=0).nonzero()[:, 0]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=kept,
            use_cache=False,
        )
        logits, targets = outputs.logits.flatten(0, 1), labels[:, kept].flatten()
        right = (logits.detach().argmax(-1) == targets)[targets != _NOT_LEARNED].float().mean()
        # trl's own loss keeps its measures there, and trl puts their means into its log.
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(right.item())
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return (loss, outputs) if return_outputs else loss
