"""The aligned model's own answers to safety conversations, kept batch by batch for the case of a kill."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import generate
from deltaguard.chat.template import render
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_journal

_BATCH: TypeAdapter[dict[int, str]] = TypeAdapter(dict[int, str])
"""A line of the journal: responses by the numbers of their conversations."""


def respond(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    journal: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Conversation]:
    """Let a model answer, greedily, the conversations that have no response.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer.
        conversations: those that have a response are returned as they are.
        max_new_tokens: tokens generated at most per answer.
        batch_size: conversations per batch.
        journal: JSON lines, one a batch; what it already holds is not generated again. It must belong to
            the same conversations.
        on_batch: called with the number of responses there are and the number of conversations.

    Returns:
        The conversations, all with responses, in the order given.

    Raises:
        DeltaguardError: the journal holds something else than responses to these conversations.
    """
    answers = {i: c.response for i, c in enumerate(conversations) if c.response is not None}
    if journal is not None:
        answers |= _read_journal(journal, asked=range(len(conversations)), given=answers)
    missing = [i for i in range(len(conversations)) if i not in answers]

    def record(chosen: Sequence[int], texts: Sequence[str]) -> None:
        batch = {missing[i]: text for i, text in zip(chosen, texts, strict=True)}
        answers.update(batch)
        if journal is not None:
            _append(journal, batch)
        if on_batch is not None:
            on_batch(len(answers), len(conversations))

    generate(
        model,
        tokenizer,
        [render(tokenizer, conversations[i]) for i in missing],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=record,
    )
    return [replace(conversation, response=answers[i]) for i, conversation in enumerate(conversations)]


def _append(journal: Path, batch: Mapping[int, str]) -> None:
    with journal.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(batch) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _read_journal(journal: Path, *, asked: range, given: Collection[int]) -> dict[int, str]:
    """The responses of whole batches, none of a conversation that came with its own."""
    remedy = start_anew(journal.parent)
    batches = read_journal(journal, _BATCH, remedy=remedy)
    found = {i: text for batch in batches for i, text in batch.items()}
    unasked = sorted(i for i in found if i not in asked or i in given)
    if unasked:
        raise DeltaguardError(
            f"{journal} cannot be used: it answers {', '.join(map(str, unasked))}; {len(asked)} conversations"
            f" were asked, counted from 0, and {len(given)} of them came with a response.\n{remedy}"
        )
    return found


def start_anew(folder: Path) -> str:
    """Say what to do with unfinished work that cannot be gone on with."""
    return f"Delete the folder {folder} and run the same command again: it starts anew."
