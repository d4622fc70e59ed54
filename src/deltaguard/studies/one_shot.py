"""Safety at One Shot: a fine-tuned model learns one refusal for a few steps (Zhang et al., ICLR 2026).

From the paper's abstract (arXiv:2601.01887): a single safety example recovers the alignment of a fine-tuned
model within a few epochs, without examples of the task; the gradient of safety is of low rank, so that one
example's points where many do. What that leaves open is chosen here and said in docs/bench.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation, build_conversations
from deltaguard.chat.predictions import logits_at
from deltaguard.chat.refusals import is_refusal
from deltaguard.chat.tokens import Batch, Encoded, encode
from deltaguard.curvature.responses import respond
from deltaguard.device import find_device
from deltaguard.models.checkpoint import Checkpoint, WeightSource
from deltaguard.models.loading import load_model, load_tokenizer
from deltaguard.models.shards import DTYPES
from deltaguard.restoration.job import open_models
from deltaguard.restoration.safety_kl import SafetyMeter

LEARNING_RATE = 2e-5
_POOL, _RESPONSE, _LENGTH = 16, 64, 512
"""Instances that the one is chosen from; tokens of an answer and of a conversation at most."""


def one_shot(
    aligned: str | Path,
    finetuned: str | Path,
    output: Path,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
) -> Conversation:
    """Write a fine-tuned model that was trained on one refusal of the aligned model.

    The aligned model answers calibration prompts; of its refusals (of all answers, should it refuse none)
    that one is learned whose gradient has the largest cosine with the gradient of all: to first order it
    lowers the loss of all most for the length of a step. AdamW without decay trains all but the embeddings.

    Args:
        aligned: a local folder or a Hub id.
        finetuned: the same, or a LoRA adapter over it.
        output: a new folder, for a checkpoint in float32 with the aligned model's tokenizer.
        steps: passes over the one instance.
        learning_rate: of every step.

    Returns:
        The instance.

    Raises:
        DeltaguardError: a model cannot be used, or its answers hold no token.
    """
    source, tuned = open_models(aligned, finetuned)
    tokenizer = load_tokenizer(source.folder, source.reference)
    pool = _refusals(source, tokenizer)
    model = _loaded(source, tuned, pool)
    batches = [_batch(tokenizer, each, model.device) for each in pool]
    parameters = _trained(model)
    chosen = _representative(model, parameters, batches)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, batches[chosen]).backward()
        optimizer.step()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return pool[chosen]


def _refusals(source: Checkpoint, tokenizer: Any) -> list[Conversation]:
    model = load_model(source.folder, source.reference, dtype=torch.float32).to(find_device("auto"))
    answered = respond(
        model, tokenizer, build_conversations(_POOL), max_new_tokens=_RESPONSE, batch_size=_POOL
    )
    said = [each for each in answered if encode(tokenizer, each, max_length=_LENGTH).has_response]
    return [each for each in said if is_refusal(each.response or "")] or said


def _loaded(source: Checkpoint, tuned: WeightSource, pool: Sequence[Conversation]) -> Any:
    """Load the fine-tuned model, whether it is a checkpoint or an adapter."""
    meter = SafetyMeter.open(source, tuned, pool[:1], device=find_device("auto"), dtype=torch.float32)
    meter.put((name, tuned.read(name).to(DTYPES[info.dtype])) for name, info in tuned.tensors.items())
    return meter.model


def _trained(model: Any) -> list[Tensor]:
    """Let everything but the embeddings, and an output layer tied to them, take gradients."""
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _batch(tokenizer: Any, conversation: Conversation, device: torch.device) -> Batch:
    found: Encoded = encode(tokenizer, conversation, max_length=_LENGTH)
    return Batch.of([found]).to(device)


def _loss(model: Any, batch: Batch) -> Tensor:
    """Compute -log p of the response, the mean over its tokens."""
    logits = logits_at(model, batch.ids, batch.mask, batch.answering)
    return torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][batch.answering[:, :-1]])


def _representative(model: Any, parameters: Sequence[Tensor], batches: Sequence[Batch]) -> int:
    """Find the instance whose gradient has the largest cosine with the sum of all, one after another."""

    def gradient(batch: Batch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_loss(model, batch), parameters)

    total: list[Tensor] = [torch.zeros_like(each) for each in parameters]
    for batch in batches:
        for mine, new in zip(total, gradient(batch), strict=True):
            mine.add_(new)
    cosines: list[float] = []
    for batch in batches:
        found = gradient(batch)
        pairs = zip(found, total, strict=True)
        dot = sum(float((one.double() * other.double()).sum()) for one, other in pairs)
        square = sum(float(one.double().square().sum()) for one in found)
        cosines.append(dot / max(square, 1e-30) ** 0.5)
    return cosines.index(max(cosines))
