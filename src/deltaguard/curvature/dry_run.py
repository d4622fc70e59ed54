"""What a calibration would take, from the headers of the model and the tokens of the prompts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import end_of_turn, render
from deltaguard.chat.tokens import context_length, encode, thought_tokens, token_ids
from deltaguard.curvature.request import LOOK_ALIKE_TOKENS, Asked, CalibrateConfig, asked_for, requested
from deltaguard.curvature.sizes import Sizes, blocks_of, held_bytes, row_bytes, rows_within, store_limit
from deltaguard.curvature.store_format import CalibrationRequest
from deltaguard.device import find_device, memory_bytes
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.experts import refuse_unknown_experts, routed_share
from deltaguard.models.loading import load_config, load_tokenizer
from deltaguard.ranks import Ranks
from deltaguard.reports.records.calibrate import CalibrationPlan


def plan_calibration(
    aligned: str | Path,
    *,
    conversations: Sequence[Conversation] | None = None,
    config: CalibrateConfig | None = None,
    ranks: Ranks | None = None,
) -> CalibrationPlan:
    """Say what `calibrate` would take with the same arguments: no weight is read, and nothing is written.

    Args:
        aligned: as in `calibrate`.
        conversations: as in `calibrate`.
        config: as in `calibrate`.
        ranks: as in `calibrate`; each process takes what is said.

    Raises:
        DeltaguardError: the model, its chat template or the prompts do not serve.
    """
    config = config or CalibrateConfig()
    source = Checkpoint.open(aligned)
    refuse_unknown_experts(source.reference, source.config, source.tensors)
    asked = asked_for(conversations, config)
    device = find_device(config.device)
    request = requested(source, asked, config, device)
    shape = load_config(source.folder, source.reference)
    lengths, answered = _lengths(asked, source, request, context_length(shape, request.max_length))
    count, largest = len(asked.calibration), partial(_largest, size=request.batch_size)
    dtype = getattr(torch, request.dtype)
    whole = Sizes.of(source.tensors.values(), routed_share(source.config))
    half = memory_bytes(device) // 2 // (ranks or Ranks()).sharing(device)
    memory = half if config.memory is None else int(config.memory)
    outside, blocks = blocks_of(source)
    by_blocks = whole.bytes(dtype) > memory and bool(blocks)
    held = max(blocks, key=lambda block: block.bytes(dtype)) if by_blocks else whole
    hidden = sum(lengths[:count]) * shape.get_text_config().hidden_size * dtype.itemsize if by_blocks else 0
    answers = 0
    if any(row.response is None for row in asked.all):
        room = memory if by_blocks else None
        answers = _answering_bytes(outside, blocks, request, shape, lengths, room=room)
    is_full = request.rank == "full"
    stored = (whole.full_bytes if is_full else store_limit(source)) + whole.leaning_bytes
    return CalibrationPlan(
        conversations=len(lengths),
        tokens=sum(lengths),
        device=str(device),
        by_blocks=by_blocks,
        limit_bytes=memory,
        answering_bytes=answers,
        weights_bytes=(held.weights + (outside.weights if by_blocks else 0)) * dtype.itemsize,
        sums_bytes=held.sums_bytes(dtype),
        pass_bytes=largest(lengths[:count]) * held.passed * dtype.itemsize,
        # What goes into a block, and what comes out of it.
        hidden_bytes=2 * hidden,
        # In float32: what they are, and their gradients.
        predicted_bytes=2 * largest(answered[:count]) * shape.get_text_config().vocab_size * 4,
        # What goes into each block, what comes out of the last, two gradients twice, and the blocks' stores.
        disk_bytes=hidden * (len(blocks) + 5) + stored if by_blocks else 0,
        store_bytes=None if is_full else stored,
    )


def _largest(tokens: Sequence[int], size: int) -> int:
    """Count the tokens of the longest conversations that may be in a batch."""
    return sum(sorted(tokens)[-size:])


def _answering_bytes(
    outside: Sizes,
    blocks: Sequence[Sizes],
    request: CalibrationRequest,
    shape: Any,
    lengths: Sequence[int],
    *,
    room: int | None,
) -> int:
    """Say what a model takes while it answers, which may be of other weights than are differentiated.

    Where these go block by block, `room` says what may be held at once: it answers so, too, where its own
    weights are more.
    """
    dtype = getattr(torch, request.dtype)
    answering: torch.dtype = getattr(torch, request.answer_dtype or request.dtype)
    whole = sum(part.weights for part in (outside, *blocks))
    if room is None:
        # It keeps its own weights while it answers in another dtype.
        return whole * (answering.itemsize + (dtype.itemsize if answering != dtype else 0))
    if whole * answering.itemsize <= room:
        return whole * answering.itemsize
    held = held_bytes(outside, blocks, answering)
    tokens = request.max_length + request.max_new_tokens
    rows = rows_within(shape, room - held, tokens=tokens, dtype=answering)
    return held + min(rows, len(lengths)) * row_bytes(shape, tokens=max(lengths), dtype=answering)


def _lengths(
    asked: Asked, source: Checkpoint, request: CalibrationRequest, limit: int
) -> tuple[list[int], list[int]]:
    """Count the tokens of each conversation, and those of each answer.

    An answer that is missing may be as long as it is let, with thoughts before it where the template begins
    them, and what ends a turn after it.
    """
    tokenizer = load_tokenizer(source.folder, source.reference)
    end = len(token_ids(tokenizer, end_of_turn(tokenizer)))
    brief = min(LOOK_ALIKE_TOKENS, request.max_new_tokens)
    parts = (
        (asked.harmful, request.max_new_tokens),
        (asked.harmless, brief),
        (asked.held_out, request.max_new_tokens),
    )
    lengths, answers = list[int](), list[int]()
    for rows, answer in parts:
        for row in rows:
            known = encode(tokenizer, row, max_length=limit)
            prompt, response = known.prompt_length, len(known.ids) - known.prompt_length
            if row.response is None:
                response = answer + end
                prompt += thought_tokens(tokenizer, render(tokenizer, row))
            lengths.append(min(prompt + response, limit))
            answers.append(max(lengths[-1] - prompt, 0))
    return lengths, answers
