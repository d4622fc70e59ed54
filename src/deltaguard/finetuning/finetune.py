"""Supervised fine-tuning of a small model, in full or as a LoRA adapter, through trl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel

from deltaguard.chat.conversations import Conversation, require_responses
from deltaguard.chat.template import messages, readable_turns
from deltaguard.device import find_device, served_dtype
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.files import read_json
from deltaguard.models.families import decoder_blocks
from deltaguard.models.hub import locate
from deltaguard.models.loading import load_model, load_tokenizer

_CHECKPOINT_SHARE = 0.1
"""Of all steps, from one checkpoint to the next."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        learning_rate: peak learning rate of AdamW; it rises over the first tenth of the steps, then falls
            linearly to 0.
        epochs: passes over the conversations, where `max_steps` is not given.
        max_steps: optimizer steps; `None` leaves the number to `epochs`.
        batch_size: conversations per step.
        max_length: tokens kept of a conversation; the end is cut off.
        seed: fixes the order of the conversations and an adapter's first weights.
        frozen_layers: decoder blocks, counted from the input, that keep their weights. The embeddings, and
            an output layer tied to them, always do.
        lora_rank: train a LoRA adapter of this rank on all linear layers of the decoder blocks, and save the
            adapter alone; `None` trains the weights themselves.
        lora_alpha: an adapter's update is multiplied by `lora_alpha / lora_rank`.

    Raises:
        DeltaguardError: `frozen_layers` and `lora_rank` are both given.
    """

    learning_rate: float
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    max_length: int = 512
    seed: int = 0
    frozen_layers: int = 0
    lora_rank: int | None = None
    lora_alpha: int = 32

    def __post_init__(self) -> None:
        if self.frozen_layers and self.lora_rank is not None:
            raise DeltaguardError(
                f"frozen_layers={self.frozen_layers} and lora_rank={self.lora_rank} do not go together: "
                "an adapter is trained on all decoder blocks. Give one of them."
            )


@dataclass(frozen=True)
class Dialogue:
    """A conversation of any number of turns, and the answer that is learned from it.

    Attributes:
        turns: what comes before the answer, each with `role` and `content`; the first may be the system's.
        answer: what the assistant says then.
    """

    turns: tuple[Mapping[str, str], ...]
    answer: str


@dataclass(frozen=True)
class Measured:
    """What training measured at a step.

    Attributes:
        step: optimizer steps done.
        steps: of how many.
        loss: mean cross-entropy of the responses' tokens, nats: of the batch, or of all validation data. Of
            preferences the loss of DPO.
        accuracy: share of these tokens that were the likeliest. Of preferences the share of pairs whose
            preferred answer became likelier against the other one.
        kind: whether on the batch that was learned from, or on the validation data.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kind: Literal["train", "validation"] = "train"


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
        validation: measured after each epoch, and never learned from.
        checkpoints: a folder that receives the state of training after each tenth of it; training that was
            interrupted goes on from the last whole one there. It belongs to this training alone.
        on_step: told what each step, and each look at the validation data, measured.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: trl or datasets is not installed, there is nothing to train on, a response is
            missing, more blocks are to be frozen than there are, or training diverged.

    Example:
        >>> pairs = [Conversation("What do bees make?", response="Honey.")]
        >>> finetune("models/smollm2", "out", pairs, config=FinetuneConfig(1e-4))  # doctest: +SKIP
    """
    require_packages("Fine-tuning", "demo", "trl", "datasets", "accelerate", "peft")
    if not conversations:
        raise DeltaguardError("There is no conversation to fine-tune on.")
    require_responses([row for row in conversations if isinstance(row, Conversation)], "to learn from")

    def make(network: Any, tokenizer: Any, states: Path) -> Any:
        if config.lora_rank is None:
            _freeze(network, config.frozen_layers)
        saves = checkpoints is not None
        return _trainer(network, tokenizer, conversations, config, states, validation, saves=saves)

    noted = None if on_step is None else progress(on_step, accuracy="mean_token_accuracy")
    return train_and_save(model, output_dir, make, config=config, checkpoints=checkpoints, noted=noted)


def train_and_save(
    model: str | Path,
    output_dir: str | Path,
    make: Callable[[Any, Any, Path], Any],
    *,
    config: FinetuneConfig,
    checkpoints: Path | None,
    noted: Any,
) -> Path:
    """Load a model, have a trainer of trl train it, and save it with its tokenizer.

    Args:
        model: folder or Hub id of the model to start from.
        output_dir: receives a safetensors model and tokenizer, or with `config.lora_rank` a PEFT adapter.
        make: makes the trainer of the model, its tokenizer and the folder for checkpoints.
        config: how to train.
        checkpoints: as in `finetune`.
        noted: a callback, as `progress` makes it, or None.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: training diverged.
    """
    folder = locate(model)
    network = load_model(folder, str(model), dtype=torch.float32)
    tokenizer = load_tokenizer(folder, str(model))
    use_cache = network.config.use_cache
    with TemporaryDirectory() as scratch:
        states = checkpoints or Path(scratch)
        trainer = make(network, tokenizer, states)
        if noted is not None:
            trainer.add_callback(noted)
        loss = float(trainer.train(resume_from_checkpoint=_last_checkpoint(states)).training_loss)
    if not isfinite(loss):
        raise DeltaguardError(
            f"Training diverged: the mean loss is {loss}. Lower the learning rate {config.learning_rate:g}."
        )
    # trl switches the cache off for training; left so, the saved model would generate many times slower.
    network.config.use_cache = use_cache
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return Path(output_dir)


def _freeze(network: Any, layers: int) -> None:
    """Keep the embeddings and the first decoder blocks as they are."""
    blocks = decoder_blocks(network)
    if layers >= len(blocks):
        raise DeltaguardError(
            f"{layers} decoder blocks are to be frozen and the model has {len(blocks)}: freeze fewer."
        )
    network.get_input_embeddings().requires_grad_(False)
    for block in blocks[:layers]:
        block.requires_grad_(False)


class _TrainerState(BaseModel):
    """What transformers writes last into a checkpoint."""

    global_step: int


def _last_checkpoint(folder: Path) -> str | None:
    """Find the last checkpoint that was written to its end."""
    whole: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found = read_json(state, _TrainerState, remedy="Training goes on from an earlier one.")
        except DeltaguardError:
            continue  # A kill cut it short; the one before is kept until it is whole.
        whole[found.global_step] = state.parent
    return str(whole[max(whole)]) if whole else None


def _rows(tokenizer: Any, conversations: Sequence[Conversation | Dialogue]) -> Any:
    """Write conversations as trl reads them."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": readable_turns(tokenizer, row.turns)
                if isinstance(row, Dialogue)
                else messages(tokenizer, row),
                "completion": [
                    {
                        "role": "assistant",
                        "content": row.answer if isinstance(row, Dialogue) else row.response or "",
                    }
                ],
            }
            for row in conversations
        ]
    )


def _trainer(
    network: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation | Dialogue],
    config: FinetuneConfig,
    scratch: Path,
    validation: Sequence[Conversation | Dialogue],
    *,
    saves: bool,
) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class CompletionTrainer(_CompletionLoss, SFTTrainer):
        """trl's trainer with a loss that costs only what the completions cost."""

    options = common_options(config, scratch, saves=saves, validates=bool(validation))
    return without_prints(
        CompletionTrainer(
            model=network,
            args=SFTConfig(completion_only_loss=True, **options),
            train_dataset=_rows(tokenizer, conversations),
            eval_dataset=_rows(tokenizer, validation) if validation else None,
            processing_class=tokenizer,
            peft_config=adapter_options(config),
        )
    )


def without_prints(trainer: Any) -> Any:
    """Have a trainer print nothing: it would print a summary to standard output."""
    from datasets import disable_progress_bars
    from transformers import PrinterCallback

    disable_progress_bars()
    trainer.remove_callback(PrinterCallback)
    return trainer


def adapter_options(config: FinetuneConfig) -> Any:
    """Say to PEFT which adapter is trained; None where all weights are."""
    from peft import LoraConfig

    rank, alpha = config.lora_rank, config.lora_alpha
    if rank is None:
        return None
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def common_options(config: FinetuneConfig, scratch: Path, *, saves: bool, validates: bool) -> dict[str, Any]:
    """Say to any trainer of trl how to train.

    Args:
        config: how to train.
        scratch: folder for checkpoints.
        saves: whether there are any.
        validates: whether there is validation data.
    """
    device = find_device()
    return {
        "output_dir": str(scratch),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "num_train_epochs": config.epochs,
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "max_length": config.max_length,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "bf16": served_dtype(device) == torch.bfloat16,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": _CHECKPOINT_SHARE,
        "save_total_limit": 2,
        "eval_strategy": "epoch" if validates else "no",
        "per_device_eval_batch_size": config.batch_size,
        "report_to": "none",
        "trust_remote_code": False,
    }


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
        kept = (labels != -100).any(dim=0).nonzero()[:, 0]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=kept,
            use_cache=False,
        )
        logits, targets = outputs.logits.flatten(0, 1), labels[:, kept].flatten()
        right = (logits.detach().argmax(-1) == targets)[targets != -100].float().mean()
        # trl's own loss keeps its measures there, and trl puts their means into its log.
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(right.item())
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return (loss, outputs) if return_outputs else loss


def progress(on_step: Callable[[Measured], None], *, accuracy: str) -> Any:
    """Make a callback of transformers that tells what each step measured.

    Args:
        on_step: told.
        accuracy: under which name the trainer logs the share that `Measured.accuracy` holds.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            at, found = (state.global_step, state.max_steps), logs or {}
            if "loss" in found:
                on_step(Measured(*at, found["loss"], found[accuracy]))
            if "eval_loss" in found:
                on_step(Measured(*at, found["eval_loss"], found[f"eval_{accuracy}"], "validation"))

    return Progress()
