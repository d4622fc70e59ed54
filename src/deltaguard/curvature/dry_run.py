"""What a calibration would take, from the headers of the model and the tokens of the prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import end_of_turn, render
from deltaguard.chat.thinking import THOUGHT_TOKENS, begins_thoughts, closed
from deltaguard.chat.tokens import context_length, encode, token_ids
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
    counted = _lengths(asked, source, request, context_length(shape, request.max_length))
    lengths = [tokens for tokens, _ in counted]
    calibrated = lengths[: len(asked.calibration)]
    answered = sorted(tokens for _, tokens in counted[: len(asked.calibration)])[-request.batch_size :]
    dtype = getattr(torch, request.dtype)
    answering = getattr(torch, request.answer_dtype or request.dtype)
    whole = Sizes.of(source.tensors.values(), routed_share(source.config))
    half = memory_bytes(device) // 2 // (ranks or Ranks()).sharing(device)
    memory = half if config.memory is None else int(config.memory)
    outside, blocks = blocks_of(source)
    by_blocks = whole.bytes(dtype) > memory and bool(blocks)
    held = max(blocks, key=lambda block: block.bytes(dtype)) if by_blocks else whole
    hidden = sum(calibrated) * shape.get_text_config().hidden_size * dtype.itemsize if by_blocks else 0
    # As a whole the model keeps its own weights while it answers in another dtype.
    kept = dtype.itemsize if answering != dtype and not by_blocks else 0
    answers = whole.weights * (answering.itemsize + kept)
    if all(row.response is not None for row in asked.all):
        answers = 0
    elif by_blocks and answers > memory:
        answers = held_bytes(outside, blocks, answering)
        answers += _rows_bytes(shape, memory - answers, lengths, request, answering)
    kept_of_all = request.rank == "full"
    # Raw sums, in whose other half the factors lie, and all eigenvectors; or what of these a store may hold.
    stored = 2 * whole.sums * torch.float32.itemsize if kept_of_all else store_limit(source)
    stored += whole.leaning_bytes
    return CalibrationPlan(
        conversations=len(lengths),
        tokens=sum(lengths),
        device=str(device),
        by_blocks=by_blocks,
        limit_bytes=memory,
        answering_bytes=answers,
        weights_bytes=(held.weights + (outside.weights if by_blocks else 0)) * dtype.itemsize,
        sums_bytes=held.sums_bytes(dtype),
        pass_bytes=sum(sorted(calibrated)[-request.batch_size :]) * held.passed * dtype.itemsize,
        # What goes into a block, and what comes out of it.
        hidden_bytes=2 * hidden,
        # In float32: what they are, and their gradients.
        predicted_bytes=2 * sum(answered) * shape.get_text_config().vocab_size * torch.float32.itemsize,
        # What goes into each block, what comes out of the last, two gradients twice, and the blocks' stores.
        disk_bytes=hidden * (len(blocks) + 5) + stored if by_blocks else 0,
        store_bytes=None if kept_of_all else stored,
    )


def _rows_bytes(
    shape: Any, room: int, lengths: Sequence[int], request: CalibrationRequest, dtype: torch.dtype
) -> int:
    """Say what the rows take that are answered at once, block by block."""
    rows = rows_within(shape, room, tokens=request.max_length + request.max_new_tokens, dtype=dtype)
    return min(rows, len(lengths)) * row_bytes(shape, tokens=max(lengths), dtype=dtype)


def _lengths(
    asked: Asked, source: Checkpoint, request: CalibrationRequest, limit: int
) -> list[tuple[int, int]]:
    """Count the tokens of each conversation, and those of its answer.

    An answer that is missing may be as long as it is let, with thoughts before it where the template begins
    them, and what ends a turn after it.
    """
    tokenizer = load_tokenizer(source.folder, source.reference)
    end = len(token_ids(tokenizer, end_of_turn(tokenizer)))
    thoughts = THOUGHT_TOKENS + len(token_ids(tokenizer, closed("")))
    brief = min(LOOK_ALIKE_TOKENS, request.max_new_tokens)
    parts = (
        (asked.harmful, request.max_new_tokens),
        (asked.harmless, brief),
        (asked.held_out, request.max_new_tokens),
    )
    lengths: list[tuple[int, int]] = []
    for rows, answer in parts:
        for row in rows:
            known = encode(tokenizer, row, max_length=limit)
            prompt, response = known.prompt_length, len(known.ids) - known.prompt_length
            if row.response is None:
                response = answer + end
                prompt += thoughts if begins_thoughts(render(tokenizer, row)) else 0
            whole = min(prompt + response, limit)
            lengths.append((whole, max(whole - prompt, 0)))
    return lengths
