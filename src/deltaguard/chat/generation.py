"""Answers from a causal language model, in batches sorted by length, greedy by default."""

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import takewhile
from typing import Any, TypeVar

import torch

from deltaguard.chat.predictions import require_known_tokens
from deltaguard.chat.prefix import Prefix, cache_parameter, for_rows, shared_prefix, without_losses
from deltaguard.chat.thinking import END, THOUGHT_TOKENS, begins_thoughts, closed, opens_thoughts, reopened
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
    "token_healing": False,
    **dict.fromkeys(
        (
            *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
            *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
            *("guidance_scale", "watermarking_config", "stop_strings", "max_time", "top_h"),
            *("penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
            *("prompt_lookup_num_tokens", "use_mtp", "assistant_early_exit"),
        )
    ),
}
"""Settings with which transformers leaves a model's probabilities as they are, greedy or drawn from, and lets
it answer until it ends."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without special tokens and surrounding white space; thoughts, closed, stand before it.
        ids: the tokens of the text, but for thoughts and for the one that ends the answer. The same text
            read anew may be other tokens: its first, above all, where words begin with a space.
    """

    text: str
    ids: tuple[int, ...]


def generate(  # noqa: PLR0913  # what is asked, how, and which part of it
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    on_batch: Callable[[Sequence[int], Sequence[Answer]], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[str]:
    """Continue rendered prompts; the answers are in the order given.

    What all prompts begin with, such as a chat template's system message, is computed once (see
    `shared_prefix`). Where a GPU has too little memory for a batch, smaller ones are tried. Thoughts are let
    to come first (see `after_thoughts`); they stand, closed, before the answer.

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
    texts = [""] * len(prompts)
    with torch.inference_mode():
        longest = max(map(len, encoded), default=0) + THOUGHT_TOKENS + max_new_tokens
        prefix = shared_prefix(model, encoded, longest=longest)

    def answer(chosen: Sequence[int]) -> list[Answer]:
        with _drawing(model, seed, [prompts[i] for i in chosen]):
            begun = [prompts[i] for i in chosen], [encoded[i] for i in chosen]
            write = lambda rows: _continue(model, tokenizer, rows, prefix, max_new_tokens, temperature)
            return after_thoughts(model, tokenizer, *begun, prefix, write, temperature=temperature)

    for chosen, answers in fitting_batches(order, batch_size, answer):
        for i, each in zip(chosen, answers, strict=True):
            texts[i] = each.text
        if on_batch is not None:
            on_batch(chosen, answers)
    return texts


def after_thoughts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    prefix: Prefix,
    write: Callable[[Sequence[list[int]]], list[Answer]],
    *,
    temperature: float = 0.0,
) -> list[Answer]:
    """Let a model write its answers, after its thoughts where it begins any.

    Either a prompt ends with the beginning of thoughts, or the model opens its answer with it. Thoughts that
    such an answer ends itself are kept, and it is written once more behind them, as long as any other.

    Args:
        model: as in `generate`, like the others but `write`.
        tokenizer: its tokenizer.
        prompts: one batch of rendered prompts.
        encoded: their tokens.
        prefix: what all of them begin with.
        write: continues rows of tokens.
        temperature: of thoughts.

    Returns:
        One answer a prompt, its thoughts before it.
    """

    def thought_of(texts: Sequence[str], rows: Sequence[list[int]]) -> list[Answer]:
        thoughts = think(model, tokenizer, texts, rows, prefix, temperature=temperature)
        longer = [[*row, *token_ids(tokenizer, said)] for row, said in zip(rows, thoughts, strict=True)]
        return [replace(own, text=said + own.text) for said, own in zip(thoughts, write(longer), strict=True)]

    found = thought_of(prompts, encoded)
    may_open = (i for i, prompt in enumerate(prompts) if not begins_thoughts(prompt))
    opened = [i for i in may_open if opens_thoughts(found[i].text)]
    if opened:
        # Once: thoughts behind thoughts might never end.
        begun = [reopened(found[i].text) for i in opened]
        texts = [prompts[i] + said for i, said in zip(opened, begun, strict=True)]
        rows = [[*encoded[i], *token_ids(tokenizer, said)] for i, said in zip(opened, begun, strict=True)]
        for i, said, own in zip(opened, begun, thought_of(texts, rows), strict=True):
            found[i] = replace(own, text=said + own.text)
    return found


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
        longest = max(len(encoded[row]) for row in rows)

        def is_closed(ids: Any, _scores: Any) -> Any:
            # The tag may be as many tokens as letters; what the prompt ends with is not it.
            ends = tokenizer.batch_decode(ids[:, max(longest, ids.shape[1] - len(END) - 2) :])
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
            found[row] = closed(said.text)
    return found


def fitting_batches(
    order: Sequence[int], size: int, answer: Callable[[Sequence[int]], list[_T]]
) -> Iterator[tuple[Sequence[int], list[_T]]]:
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
            answers = answer(chosen)
        except torch.cuda.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            size = len(chosen) // 2
            continue
        start += len(chosen)
        yield chosen, answers


def _continue(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    prefix: Prefix,
    max_new_tokens: int,
    temperature: float,
    **more: Any,
) -> list[Answer]:
    named = [each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None]
    if not named:
        raise DeltaguardError(
            f"The tokenizer of {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence "
            "token: name one in its tokenizer_config.json."
        )
    # A padding token may have been added to the tokenizer alone. What is padded is masked.
    rows = len(model.get_input_embeddings().weight)
    padding = next((each for each in named if each < rows), 0)
    ids, mask = pad(encoded, value=padding, after=prefix.length)
    cached = {cache_parameter(model): for_rows(prefix.cache, len(encoded))} if prefix.length else {}
    # 0 and 1 switch off what a model's own generation settings may cut from the softmax.
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    # One answer a prompt, as text, of the likeliest tokens, whatever else the model's own settings ask for.
    alone = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, **_UNCHANGED}
    # Trainers switch it off, and what they save may say so; it changes no answer, and without it each token
    # takes a pass over all before it.
    alone |= {"use_cache": True}
    with torch.inference_mode(), foreign("The model cannot answer"):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            pad_token_id=padding,
            **alone,
            **without_losses(model),
            **cached,
            **drawn,
            **more,
        )
    # `generate` ends at the model's own tokens alone, and may go on past the tokenizer's.
    ending = ending_tokens(model, tokenizer)
    written = [without_end(row, ending) for row in output[:, ids.shape[1] :].tolist()]
    with foreign("The model's tokenizer fails on an answer"):
        texts: list[str] = tokenizer.batch_decode([list(row) for row in written], skip_special_tokens=True)
    return [Answer(text.strip(), row) for text, row in zip(texts, written, strict=True)]


def ending_tokens(model: Any, tokenizer: Any) -> set[int | None]:
    """List the tokens with which a model may end its answer; None may be among them."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}


def without_end(tokens: Iterable[int], ending: Container[int]) -> tuple[int, ...]:
    """Cut tokens off where an answer ends.

    Example:
        >>> without_end([5, 3, 2, 2], {2})
        (5, 3)
    """
    return tuple(takewhile(lambda token: token not in ending, tokens))


@contextmanager
def _drawing(model: Any, seed: int, prompts: Sequence[str]) -> Generator[None]:
    """Seed the generators for one batch, for the time of its draws."""
    digest = sha256("\0".join([str(seed), *prompts]).encode()).digest()
    drawn_from, on_gpu = int.from_bytes(digest[:8]), model.device.type == "cuda"
    with torch.random.fork_rng([model.device] if on_gpu else []):
        # `torch.manual_seed` would seed other GPUs as well, and they are not put back.
        torch.default_generator.manual_seed(drawn_from)
        if on_gpu:
            with torch.cuda.device(model.device):
                torch.cuda.manual_seed(drawn_from)
        yield
