"""What every training through trl has in common: how it is told, watched, interrupted and saved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel

from deltaguard.chat.tokens import context_length
from deltaguard.device import find_device, served_dtype
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.experts import is_projection, routed_share
from deltaguard.models.families import decoder_blocks, is_linear, is_router, modules_in_blocks
from deltaguard.models.hub import locate
from deltaguard.models.loading import foreign, load_model, load_tokenizer


class UntrainableError(DeltaguardError):
    """Training that its own data or settings do not allow."""


class DivergedError(UntrainableError):
    """Training whose loss became infinite, or no number."""


Rows = Sequence[dict[str, list[int]]]
"""Conversations as tokens, by the names of trl's columns."""

_CHECKPOINT_SHARE = 0.1
"""Of all steps, from one checkpoint to the next."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        learning_rate: peak learning rate of AdamW; it rises over the first tenth of the steps, then falls
            linearly to 0. Where there is one step alone, it is that of this step.
        epochs: passes over the conversations, where `max_steps` is not given.
        max_steps: optimizer steps; `None` leaves the number to `epochs`.
        batch_size: conversations per step.
        max_length: tokens kept of a conversation; the end is cut off.
        seed: fixes the order of the conversations and an adapter's first weights.
        frozen_layers: decoder blocks, counted from the input, that keep their weights. The embeddings, and
            an output layer tied to them, always do.
        lora_rank: train a LoRA adapter of this rank on all linear layers of the decoder blocks, of a mixture
            of experts on those of its attention, and save the adapter alone; `None` trains the weights
            themselves.
        lora_alpha: an adapter's update is multiplied by `lora_alpha / lora_rank`.
        device: `auto`, `cpu` or `cuda`, which is the first GPU that the process sees.

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
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.frozen_layers and self.lora_rank is not None:
            raise DeltaguardError(
                f"frozen_layers={self.frozen_layers} and lora_rank={self.lora_rank} do not go together: "
                "an adapter is trained on all decoder blocks. Give one of them."
            )


@dataclass(frozen=True)
class Measured:
    """What training measured at a step.

    Attributes:
        step: optimizer steps done.
        steps: of how many.
        loss: mean cross-entropy of the responses' tokens, nats: of the batch; of all validation data the
            mean over its batches. Of preferences the loss of DPO.
        accuracy: share of these tokens that were the likeliest. Of preferences the share of pairs whose
            preferred answer became likelier against the other one.
        kind: whether on the batch that was learned from, or on the validation data.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kind: Literal["train", "validation"] = "train"


def train_and_save(
    model: str | Path,
    output_dir: str | Path,
    *,
    write: Callable[[Any, int], tuple[Rows, Rows]],
    make: Callable[[Any, Any, tuple[Rows, Rows], dict[str, Any]], Any],
    config: FinetuneConfig,
    checkpoints: Path | None,
    noted: Any,
) -> Path:
    """Load a model, have a trainer of trl train it, and save it with its tokenizer.

    Args:
        model: folder or Hub id of the model to start from.
        output_dir: receives a safetensors model and tokenizer, or with `config.lora_rank` a PEFT adapter.
        write: by a tokenizer, of so many tokens at most: what is learned from, and what is measured on.
        make: makes the trainer of the model, its tokenizer, both rows and the options of any trainer of trl.
        config: how to train.
        checkpoints: as in `finetune`.
        noted: a callback, as `progress` makes it, or None.

    Returns:
        The folder written.

    Raises:
        DivergedError: the loss, or a weight, became infinite, or no number.
        DeltaguardError: no answer is left to learn from, since all prompts are too long; more blocks are to
            be frozen than there are, or the device cannot be used.
    """
    folder = locate(model)
    network = load_model(folder, str(model), dtype=torch.float32)
    tokenizer = load_tokenizer(folder, str(model))
    # Of models that see pictures the configuration has none of its own.
    use_cache = getattr(network.config, "use_cache", None)
    if config.lora_rank is None:
        _freeze(network, config.frozen_layers)
    with TemporaryDirectory() as scratch:
        states = checkpoints or Path(scratch)
        longest = context_length(network.config, config.max_length)
        rows = write(tokenizer, longest)
        options = _options(config, states, rows, longest=longest, saves=checkpoints is not None)
        trainer = make(network, tokenizer, rows, options)
        if noted is not None:
            trainer.add_callback(noted)
        loss = float(trainer.train(resume_from_checkpoint=_last_checkpoint(states)).training_loss)
        _validate_at_the_end(trainer)
    # The loss is 0 where a training that had diverged is gone on with at its last step.
    if not isfinite(loss) or not all(bool(each.isfinite().all()) for each in trainer.model.parameters()):
        raise DivergedError(
            f"Training diverged: the mean loss is {loss}, or weights are no numbers. Lower the learning rate "
            f"{config.learning_rate:g}."
        )
    # trl switches the cache off for training; left so, the saved model would generate many times slower.
    if use_cache is not None:
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


def _validate_at_the_end(trainer: Any) -> None:
    """Look at the validation data where that is left: a kill came between the last checkpoint and it."""
    state = trainer.state
    looked = any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)
    if trainer.eval_dataset is not None and not looked:
        trainer.evaluate()


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


def make_trainer(
    kind: Any,
    arguments: Any,
    network: Any,
    tokenizer: Any,
    rows: tuple[Rows, Rows],
    config: FinetuneConfig,
    **more: Any,
) -> Any:
    """Make a trainer of trl that keeps to one GPU and prints nothing.

    Args:
        kind: its class.
        arguments: its configuration.
        network: the model.
        tokenizer: its tokenizer.
        rows: the tokens that are learned from, and those that are measured on, if any.
        config: says whether an adapter is trained.
        **more: further arguments of the class.

    Raises:
        UntrainableError: there is nothing to learn from.
        DeltaguardError: trl refuses the model or the tokenizer.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback

    learned, validation = (Dataset.from_list(list(each)) if each else None for each in rows)
    if learned is None:
        raise UntrainableError(
            f"There is nothing to learn from: before every answer stand {arguments.max_length} tokens or "
            "more, and the rest is cut off. Give shorter conversations, or a larger max_length."
        )
    disable_progress_bars()
    with foreign("trl cannot begin the training"):
        trainer = kind(
            model=network,
            args=on_one_gpu(arguments),
            train_dataset=learned,
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=_adapter_options(network, config),
            **more,
        )
    # It would print a summary to standard output.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _adapter_options(network: Any, config: FinetuneConfig) -> Any:
    """Say to PEFT which adapter is trained; None where all weights are."""
    from peft import LoraConfig

    rank, alpha = config.lora_rank, config.lora_alpha
    if rank is None:
        return None
    found = modules_in_blocks(network).items()
    layers = [name for name, module in found if is_linear(module) and not is_router(module)]
    if routed_share(network.config.to_dict()) < 1:
        # PEFT would train experts' stacks in their place, as parameters, which no plain LoRA adapter holds.
        layers = [name for name in layers if not is_projection(name)]
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM")


def on_one_gpu(arguments: Any) -> Any:
    """Keep a training on one GPU.

    Of several, transformers would give each a part of every batch, which is larger then, and of the positions
    at which a loss is computed.

    Args:
        arguments: of a trainer.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001  # as transformers' trainer does itself
    return arguments


def _options(
    config: FinetuneConfig, states: Path, rows: tuple[Rows, Rows], *, longest: int, saves: bool
) -> dict[str, Any]:
    """Say to any trainer of trl how to train; checkpoints go to `states`."""
    from transformers import TrainingArguments

    device = trained_on(config.device)
    steps = config.max_steps or ceil(config.epochs * ceil(len(rows[0]) / config.batch_size))
    # Its name before transformers 5.23.
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    return {
        "output_dir": str(states),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        # The rate rises from 0: the only step there is would change nothing.
        "warmup_steps": 0.1 if steps > 1 else 0,
        "weight_decay": 0.0,
        "num_train_epochs": config.epochs,
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "max_length": longest,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "bf16": served_dtype(device) == torch.bfloat16,
        "activation_checkpointing" if renamed else "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": _CHECKPOINT_SHARE,
        "save_total_limit": 2,
        "eval_strategy": "epoch" if rows[1] else "no",
        "per_device_eval_batch_size": config.batch_size,
        "report_to": "none",
        "trust_remote_code": False,
    }


def trained_on(device: str) -> torch.device:
    """Find the device of a training: transformers takes the first GPU, whichever is asked for.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        DeltaguardError: it cannot be used, or is another GPU than the first.

    Example:
        >>> trained_on("cpu")
        device(type='cpu')
    """
    found = find_device(device)
    if found.index:
        raise DeltaguardError(
            f"Training takes the first GPU that the process sees, and not {device}: set "
            f"CUDA_VISIBLE_DEVICES={found.index}, and ask for `cuda`."
        )
    return found


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
