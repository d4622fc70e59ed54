"""An attacker who knows the method: a fine-tune whose predicted safety KL stays small all along.

The penalty's exact proximal step is the defender's own closed form. The attacker takes it after every few
steps of the optimiser, so that what is trained is what a prediction would let through.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experiments.laboratory import Laboratory
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch, batches, encode
from deltaguard.restoration.curvature import Spectra
from deltaguard.solvers import joint_profile, project

_BATCH = 4
_RATE = 1e-4


def evade(
    aligned: Path,
    data: Sequence[Conversation],
    spectra: Mapping[str, Spectra],
    *,
    mu: float,
    every: int = 5,
    epochs: int,
) -> dict[str, Tensor]:
    """Fine-tune all layers that a restore would change, and nothing else.

    Args:
        aligned: the model attacked.
        data: what it is trained on.
        spectra: the defender's curvature, which the attacker can compute.
        mu: price of the predicted safety loss; 0 is a plain fine-tune.
        every: steps of the optimiser between proximal steps.
        epochs: passes over the data.

    Returns:
        The deltas.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(aligned)
    model: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    parameters = {n: p.requires_grad_(requires_grad=n in spectra) for n, p in model.named_parameters()}
    base = {name: parameters[name].detach().clone() for name in spectra}
    steps = _steps(tokenizer, data, epochs)
    optimiser = torch.optim.AdamW([parameters[name] for name in spectra], lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * len(steps)), (len(steps) - step) / (0.9 * len(steps)))
    )
    for number, batch in enumerate(steps, start=1):
        optimiser.zero_grad()
        logits = logits_at(model, batch.ids, batch.mask, batch.answering)
        targets = batch.ids[:, 1:][batch.answering[:, :-1]]
        torch.nn.functional.cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        optimiser.step()
        schedule.step()
        if mu and (number % every == 0 or number == len(steps)):
            _proximal(parameters, base, spectra, mu)
    return {name: parameters[name].detach() - base[name] for name in spectra}


def predicted_kl(lab: Laboratory, spectra: Mapping[str, Spectra]) -> float:
    """½ Σ tr(G Δ H Δᵀ) over all layers of a fine-tune."""
    parts = (project(d, spectra[n].inputs, spectra[n].outputs) for n, d in lab.deltas.items())
    return joint_profile(part.directions.profile() for part in parts).predicted_kl(0.0)


@torch.no_grad()
def _proximal(
    parameters: Mapping[str, Tensor], base: Mapping[str, Tensor], spectra: Mapping[str, Spectra], mu: float
) -> None:
    for name, start in base.items():
        found = project(parameters[name] - start, spectra[name].inputs, spectra[name].outputs)
        parameters[name].copy_(start + found.restored(mu))


def _steps(tokenizer: Any, data: Sequence[Conversation], epochs: int) -> list[Batch]:
    texts = [encode(tokenizer, conversation, max_length=512) for conversation in data]
    draw = random.Random(0)
    steps: list[Batch] = []
    for _ in range(epochs):
        draw.shuffle(texts)
        for start in range(0, len(texts), _BATCH):
            steps += batches(texts[start : start + _BATCH], _BATCH)
    return steps
