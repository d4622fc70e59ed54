"""Prompts that a calibration cannot ask, since their answers would have no room."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import render
from deltaguard.chat.tokens import encode, thought_tokens
from deltaguard.curvature.request import LOOK_ALIKE_TOKENS, Asked
from deltaguard.curvature.store_format import CalibrationRequest


def answer_what_has_no_room(
    asked: Asked, tokenizer: Any, request: CalibrationRequest, positions: int
) -> Asked:
    """Give an empty answer to each prompt after which the model has no positions, or no token counts.

    Args:
        asked: what is to be asked; conversations with responses stay as they are.
        tokenizer: the model's, with its chat template.
        request: says how many tokens a conversation has at most, and an answer.
        positions: that the model has.
    """
    opening = min(LOOK_ALIKE_TOKENS, request.max_new_tokens)

    def fits(row: Conversation, tokens: int) -> bool:
        thoughts = thought_tokens(tokenizer, render(tokenizer, row))
        # Of a conversation, a token of the answer must be left.
        room = max(0, min(request.max_length - 1, positions - 1, positions - tokens - thoughts))
        return len(encode(tokenizer, row, max_length=room + 1).ids) <= room

    def fitting(rows: Sequence[Conversation], tokens: int) -> list[Conversation]:
        return [
            row if row.response is not None or fits(row, tokens) else replace(row, response="")
            for row in rows
        ]

    return Asked(
        safety=fitting(asked.safety, request.max_new_tokens),
        look_alikes=fitting(asked.look_alikes, opening),
        held_out=fitting(asked.held_out, request.max_new_tokens),
        framed=fitting(asked.framed, request.max_new_tokens),
        framed_look_alikes=fitting(asked.framed_look_alikes, opening),
    )
