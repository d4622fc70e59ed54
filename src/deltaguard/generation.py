"""Answers from a causal language model, in batches sorted by length, greedy by default."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    on_batch: Callable[[Sequence[int], Sequence[str]], None] | None = None,
) -> list[str]:
    """Greedy continuations of rendered prompts, in the order given.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer; a missing padding token is replaced by the end-of-sequence token.
        prompts: texts with the chat template already applied (see `conversations.render`).
        max_new_tokens: tokens generated at most per answer.
        batch_size: prompts per batch; batches hold prompts of similar length.
        on_batch: called after each batch with the indices answered and their answers.

    Returns:
        One answer a prompt, special tokens and surrounding white space removed.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        if on_batch is not None:
            on_batch(chosen, [answers[i] for i in chosen])
    return answers
