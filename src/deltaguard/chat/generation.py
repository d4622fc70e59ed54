"""Answers from a causal language model, in batches sorted by length, greedy by default."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch

from deltaguard.chat.predictions import require_known_tokens
from deltaguard.chat.prefix import Prefix, cache_parameter, for_rows, shared_prefix
from deltaguard.chat.thinking import END, THOUGHT_TOKENS, begins_thoughts, closed
from deltaguard.chat.tokens import pad, token_ids
from deltaguard.errors import DeltaguardError
from deltaguard.models.loading import foreign

_UNCHANGED: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings with which transformers leaves a model's probabilities as they are, greedy or drawn from."""


def generate(  # noqa: PLR0913  # what is asked, how, and which part of it
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    on_batch: Callable[[Sequence[int], Sequence[str]], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[str]:
    """Continue rendered prompts; the answers are in the order given.

    What all prompts begin with, such as a chat template's system message, is computed once (see
    `shared_prefix`). Where a GPU has too little memory for a batch, smaller ones are tried. A prompt that
    ends where thoughts begin is thought about first (see `think`); these stand, closed, before the answer.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer; a missing padding token is replaced by the end-of-sequence token.
        prompts: texts with the chat template already applied (see `conversations.render`).
        max_new_tokens: tokens generated at most per answer.
        batch_size: prompts per batch; batches hold prompts of similar length.
        temperature: 0 takes the likeliest token each time; otherwise tokens are drawn from the whole softmax
            at this temperature.
        seed: of the draws. They depend on it and on the prompts of the batch, and on nothing that was
            drawn before; the global generators are left as they were.
        on_batch: called after each batch with the indices answered and their answers.
        part: which of how many: the first part is the first batch, and each that comes so many later. What
            is in other parts is not answered.

    Returns:
        One answer a prompt, special tokens and surrounding white space removed.
    """
    encoded = [token_ids(tokenizer, text) for text in prompts]
    require_known_tokens(model, max((max(ids, default=0) for ids in encoded), default=0))
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    order = [i for place, i in enumerate(order) if place // batch_size % part[1] == part[0]]
    answers = [""] * len(prompts)
    prefix = shared_prefix(model, encoded)

    def answer(chosen: Sequence[int]) -> list[str]:
        with _drawing(model, seed, [prompts[i] for i in chosen]):
            rows = [encoded[i] for i in chosen]
            thoughts = think(
                model, tokenizer, [prompts[i] for i in chosen], rows, prefix, temperature=temperature
            )
            rows = [[*row, *token_ids(tokenizer, said)] for row, said in zip(rows, thoughts, strict=True)]
            texts = _continue(model, tokenizer, rows, prefix, max_new_tokens, temperature)
            return [said + text for said, text in zip(thoughts, texts, strict=True)]

    for chosen, texts in fitting_batches(order, batch_size, answer):
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
        if on_batch is not None:
            on_batch(chosen, texts)
    return answers


def think(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    prefix: Prefix,
    *,
    temperature: float = 0.0,
) -> list[str]:
    """Let a model think where prompts end with the beginning of thoughts, for `THOUGHT_TOKENS` at most.

    Args:
        model: as in `generate`.
        tokenizer: its tokenizer.
        prompts: one batch of rendered prompts.
        encoded: their tokens.
        prefix: what all of them begin with.
        temperature: as in `generate`.

    Returns:
        What comes between each prompt and its answer: thoughts, closed; nothing where none begin.
    """
    found = [""] * len(prompts)
    rows = [row for row, prompt in enumerate(prompts) if begins_thoughts(prompt)]
    if rows:

        def is_closed(ids: Any, _scores: Any) -> Any:
            # The tag may be as many tokens as letters; the prompt's own opening tag is not it.
            ends = tokenizer.batch_decode(ids[:, -len(END) - 2 :])
            return torch.tensor([END in each for each in ends], device=ids.device)

        thoughts = _continue(
            model,
            tokenizer,
            [encoded[row] for row in rows],
            prefix,
            THOUGHT_TOKENS,
            temperature,
            stopping_criteria=[is_closed],
        )
        for row, said in zip(rows, thoughts, strict=True):
            found[row] = closed(said)
    return found


def fitting_batches(
    order: Sequence[int], size: int, answer: Callable[[Sequence[int]], list[str]]
) -> Iterator[tuple[Sequence[int], list[str]]]:
    """Answer prompts batch by batch, by half as many where a GPU has too little memory.

    Args:
        order: numbers of prompts.
        size: how many a batch has at first.
        answer: answers the prompts of some numbers.

    Yields:
        The numbers of a batch, and their answers.
    """
    start = 0
    while start < len(order):
        chosen = order[start : start + size]
        try:
            texts = answer(chosen)
        except torch.cuda.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            size = len(chosen) // 2
            continue
        start += len(chosen)
        yield chosen, texts


def _continue(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    prefix: Prefix,
    max_new_tokens: int,
    temperature: float,
    **more: Any,
) -> list[str]:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise DeltaguardError(
            f"The tokenizer of {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence "
            "token: name one in its tokenizer_config.json."
        )
    ids, mask = pad(encoded, value=padding, after=prefix.length)
    cached = {cache_parameter(model): for_rows(prefix.cache, len(encoded))} if prefix.length else {}
    # 0 and 1 switch off what a model's own generation settings may cut from the softmax.
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    # One answer a prompt, as text, of the likeliest tokens, whatever else the model's own settings ask for.
    alone = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, **_UNCHANGED}
    with torch.inference_mode(), foreign("The model cannot answer"):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            pad_token_id=padding,
            **alone,
            **cached,
            **drawn,
            **more,
        )
    with foreign("The model's tokenizer fails on an answer"):
        texts: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@contextmanager
def _drawing(model: Any, seed: int, prompts: Sequence[str]) -> Generator[None]:
    """Seed the generators for one batch, for the time of its draws."""
    digest = sha256("\0".join([str(seed), *prompts]).encode()).digest()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8]))
        yield
