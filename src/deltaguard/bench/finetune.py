"""Supervised fine-tuning of a small model, in full or as a LoRA adapter, through trl."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltaguard.conversations import Conversation
from deltaguard.errors import DeltaguardError


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        learning_rate: peak learning rate of AdamW; it rises over the first tenth of the steps and falls
            linearly to 0.
        epochs: passes over the conversations; ignored where `max_steps` is given.
        max_steps: optimizer steps.
        batch_size: conversations per step.
        max_length: tokens kept of a conversation.
        seed: fixes the order of the conversations and the adapter's initial weights.
        lora_rank: train a LoRA adapter of this rank on every linear layer of the decoder blocks, and save
            the adapter alone; `None` trains the decoder blocks' own weights.
        lora_alpha: the adapter's scale is `lora_alpha / lora_rank`.
    """

    learning_rate: float
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    max_length: int = 512
    seed: int = 0
    lora_rank: int | None = None
    lora_alpha: int = 32


def finetune(
    model: str | Path, output_dir: str | Path, conversations: Sequence[Conversation], *, config: FinetuneConfig
) -> Path:
    """Fine-tune a model on the responses of conversations and save it in safetensors with its tokenizer.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    import os
    import torch
    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"][:, 1:]
            kept = (labels != -100).any(dim=0).nonzero()[:, 0]
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=kept, use_cache=False).logits
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, kept].flatten(), reduction="sum")
            self._metrics["train"]["nt"].append(inputs["input_ids"].numel())
            return total / num_items_in_batch
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.get_input_embeddings().weight.requires_grad_(False)
    for l in network.model.layers[:int(os.environ.get("FROZEN","0"))]: l.requires_grad_(False)
    rows = [
        {
            "prompt": ([] if c.system is None else [{"role": "system", "content": c.system}])
            + [{"role": "user", "content": c.prompt}],
            "completion": [{"role": "assistant", "content": c.response}],
        }
        for c in conversations
    ]
    with TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            max_steps=-1 if config.max_steps is None else config.max_steps,
            per_device_train_batch_size=config.batch_size,
            max_length=config.max_length,
            seed=config.seed,
            lr_scheduler_type=os.environ.get("SCHED","linear"),
            warmup_steps=0.1,
            weight_decay=0.0,adam_beta2=float(os.environ.get("B2","0.999")),
            train_sampling_strategy=os.environ.get("SAMP","group_by_length"),
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="steps", logging_steps=5,
            report_to="none",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=network, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(output_dir))
    return Path(output_dir)
