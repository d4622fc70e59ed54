"""What users of transformers see: tokens of a conversation, and safety KL, in float64, one text at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """By the norm of the difference, over that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


def predicted(store: Any, deltas: Any, method: str = "kfac") -> float:
    """½ Σ tr(G Δ H Δᵀ) over the layers, in float64, of matrices written out in full."""

    def written(found: Any) -> torch.Tensor:
        return found.to(torch.float64).dense()

    total = 0.0
    for group in store.groups:
        inputs = written(store.input_spectrum(group.name))
        for layer in group.layers:
            outputs = written(store.output_spectrum(layer.tensor))
            if method == "ridge":
                outputs = store.output_mean(layer.tensor) * torch.eye(len(outputs)).double()
            delta = deltas[layer.tensor].T if layer.transposed else deltas[layer.tensor]
            total += 0.5 * float(torch.trace(outputs @ delta @ inputs @ delta.T))
    return total


def most_likely(logits: torch.Tensor, **_: Any) -> torch.Tensor:
    """Instead of `drawn_likelihood`, where nothing may depend on a draw."""
    return logits.float().log_softmax(-1).amax(-1).sum()


def tokens_of(tokenizer: Any, conversation: Any) -> tuple[torch.Tensor, int]:
    """Ids, (1, tokens), of something with a prompt, a system message and a response; where that begins."""
    turns = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    turns.append({"role": "user", "content": conversation.prompt})
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    text = prompt + conversation.response + models.EOS
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"], start


def safety_kl(aligned: Path, candidate: Path, conversations: Sequence[Any]) -> float:
    """The mean of KL(aligned ‖ candidate) over the response tokens of conversations, nats.

    Each folder's model is asked by that folder's own tokenizer and chat template; the tokens of the response
    are the aligned model's.
    """
    folders = (aligned, candidate)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in folders]
    # By default torch multiplies experts in float32 at most.
    how: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    one, other = (AutoModelForCausalLM.from_pretrained(f, **how) for f in folders)
    terms: list[float] = []
    for conversation in conversations:
        (mine, start), (theirs, begin) = (tokens_of(each, conversation) for each in tokenizers)
        theirs = torch.cat([theirs[:, :begin], mine[:, start:]], dim=1)
        with torch.no_grad():
            p = one(input_ids=mine).logits[0, start - 1 : -1].softmax(-1)
            q = other(input_ids=theirs).logits[0, begin - 1 : -1].softmax(-1)
        terms += (p * (p / q[:, : p.shape[1]]).log()).sum(-1).tolist()
    return sum(terms) / len(terms)
