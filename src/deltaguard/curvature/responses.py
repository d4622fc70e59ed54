"""The aligned model's own answers to safety conversations, and the folder that keeps them until the end."""

import os
import shutil
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import Answer, generate
from deltaguard.chat.template import render
from deltaguard.curvature.staged import require_empty
from deltaguard.curvature.store_format import MANIFEST, CalibrationRequest, read_manifest
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import append_journal, read_journal, read_json
from deltaguard.models.durable import explained, lock_folder, write_atomically
from deltaguard.ranks import Ranks

_BATCH: TypeAdapter[dict[int, Answer]] = TypeAdapter(dict[int, Answer])
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
    ranks: Ranks | None = None,
) -> list[Conversation]:
    """Let a model answer, greedily, the conversations that have no response.

    Args:
        model: a transformers causal language model in evaluation mode; None where all have a response.
        tokenizer: its tokenizer.
        conversations: those that have a response are returned as they are.
        max_new_tokens: tokens generated at most per answer.
        batch_size: conversations per batch.
        journal: JSON lines, one a batch; what it already holds is not generated again. It must belong to
            the same conversations.
        on_batch: called with the number of responses there are, about, and the number of conversations.
        ranks: the processes that share the batches, all of which call this; each has a journal of its own
            beside that of the first. By default this one alone.

    Returns:
        The conversations, all with responses, in the order given.

    Raises:
        DeltaguardError: the journal holds something else than responses to these conversations, or cannot be
            written.
    """
    ranks = ranks or Ranks()
    given = {i for i, c in enumerate(conversations) if c.response is not None}
    answers: dict[int, Answer] = {}
    if journal is not None:
        # Before any of them writes to its own.
        answers |= ranks.from_first(_read_journals(journal, conversations) if ranks.leads else None)
        journal = _journal_of(ranks.rank, journal)
    missing, known = [i for i in range(len(conversations)) if i not in given | answers.keys()], len(answers)

    def record(chosen: Sequence[int], written: Sequence[Answer]) -> None:
        batch = {missing[i]: answer for i, answer in zip(chosen, written, strict=True)}
        answers.update(batch)
        if journal is not None:
            with explained(journal):
                append_journal(journal, _BATCH.dump_json(batch).decode())
        if on_batch is not None:
            # The others are about as far.
            done = len(given) + known + ranks.size * (len(answers) - known)
            on_batch(min(done, len(conversations)), len(conversations))

    if missing:
        generate(
            model,
            tokenizer,
            [render(tokenizer, conversations[i]) for i in missing],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=record,
            part=(ranks.rank, ranks.size),
        )
    for found in ranks.from_all(answers):
        answers |= found
    return [
        conversation
        if i in given
        else replace(conversation, response=answers[i].text, response_ids=answers[i].ids)
        for i, conversation in enumerate(conversations)
    ]


def is_answer_missing(conversations: Sequence[Conversation], journal: Path) -> bool:
    """Tell whether a conversation has neither a response nor one in the journals of a run.

    Args:
        conversations: as in `respond`.
        journal: as in `respond`.

    Raises:
        DeltaguardError: a journal holds something else than responses to these conversations.
    """
    given = {i for i, each in enumerate(conversations) if each.response is not None}
    return len(given | _read_journals(journal, conversations).keys()) < len(conversations)


def _journal_of(rank: int, first: Path) -> Path:
    return first if rank == 0 else first.with_name(f"{first.stem}-{rank}{first.suffix}")


def _journals(first: Path) -> list[Path]:
    """Find the journals that the processes of a run, which may have been several, left."""
    others = sorted(first.parent.glob(f"{first.stem}-*{first.suffix}"))
    return [first, *others] if first.exists() else others


def _read_journals(first: Path, conversations: Sequence[Conversation]) -> dict[int, Answer]:
    asked, found = range(len(conversations)), dict[int, Answer]()
    given = {i for i, each in enumerate(conversations) if each.response is not None}
    for journal in _journals(first):
        found |= _read_journal(journal, asked=asked, given=given)
    return found


def _read_journal(journal: Path, *, asked: range, given: Collection[int]) -> dict[int, Answer]:
    """Read the responses of whole batches, none to a conversation that came with its own."""
    remedy = start_anew(journal.parent)
    batches = read_journal(journal, _BATCH, remedy=remedy)
    found = {i: answer for batch in batches for i, answer in batch.items()}
    unasked = sorted(i for i in found if i not in asked or i in given)
    if unasked:
        raise DeltaguardError(
            f"{journal} cannot be used: it answers {', '.join(map(str, unasked))}; {len(asked)} conversations"
            f" were asked, counted from 0, and {len(given)} of them came with a response.\n{remedy}"
        )
    return found


def start_anew(folder: Path) -> str:
    """Say how to begin again where what a run left cannot be used."""
    return f"Delete the folder {folder} and run the same command again: it starts anew."


@contextmanager
def workspace(output: Path, request: CalibrationRequest, *, resume: bool) -> Generator[Path | None]:
    """Keep what was asked for and the responses so far in `OUTPUT.partial`, beside a calibration's output.

    That folder is locked to the end of the `with` block, so that two runs never continue the same work, and
    removed where the block ends well: the store is in place then.

    Args:
        output: the folder of the store.
        request: what is asked for.
        resume: whether an earlier run is to be continued, or its finished store accepted.

    Yields:
        The file for responses (see `respond`); None where there is nothing left to do.

    Raises:
        DeltaguardError: the output is not empty or there is unfinished work, and this is no resumption;
            or what is there was asked for otherwise; or another process is at it.
    """
    output = output.resolve()
    folder = output.with_name(f"{output.name}.partial")
    asked, journal = folder / "request.json", folder / "responses.jsonl"
    if _is_finished(output, request, resume=resume):
        # The process that has just finished it may be at this, too.
        shutil.rmtree(folder, ignore_errors=True)
        yield None
        return
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        # Another process may have finished before it gave up the lock.
        if _is_finished(output, request, resume=resume):
            yield None
        else:
            # Where all conversations come with responses, blocks alone are unfinished work.
            if any(folder.glob("*.jsonl")) or (folder / "blocks").exists():
                if not resume:
                    raise DeltaguardError(
                        f"An unfinished calibration lies in {folder}. Resume it (`--resume`), or delete that "
                        "folder."
                    )
                remedy = start_anew(folder)
                if not asked.is_file():
                    raise DeltaguardError(f"{asked} is missing, so nobody knows what was asked for. {remedy}")
                earlier = read_json(asked, CalibrationRequest, remedy=remedy)
                _require_same(folder, request, earlier)
            write_atomically(asked, request.model_dump_json(indent=2))
            yield journal
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    finally:
        os.close(lock)


@contextmanager
def shared_workspace(
    output: Path, request: CalibrationRequest, ranks: Ranks, *, resume: bool
) -> Generator[Path | None]:
    """Keep a `workspace` for several processes, of which the first holds it; all leave it together."""
    if ranks.leads:
        with workspace(output, request, resume=resume) as journal:
            yield ranks.from_first(journal)
    else:
        yield ranks.from_first()
    ranks.wait()


def _is_finished(output: Path, request: CalibrationRequest, *, resume: bool) -> bool:
    """Say whether the store is there and may be returned."""
    if resume and (output / MANIFEST).exists():
        _require_same(output, request, read_manifest(output).provenance)
        return True
    require_empty(output)
    return False


class OtherCalibrationError(DeltaguardError):
    """What lies there was asked for otherwise.

    Attributes:
        where: the folder.
    """

    def __init__(self, where: Path, message: str) -> None:
        """Tell of a folder."""
        super().__init__(message)
        self.where = where


def _require_same(where: Path, request: CalibrationRequest, earlier: CalibrationRequest) -> None:
    differing = [
        f"{field} is {value!r} now and was {getattr(earlier, field)!r}"
        for field, value in request.model_dump().items()
        if getattr(earlier, field) != value
    ]
    if differing:
        title = (
            f"{where} belongs to another calibration, so this one cannot resume it; delete that "
            "folder, choose another output folder, or ask for the same"
        )
        raise OtherCalibrationError(where, listed(title, differing))
