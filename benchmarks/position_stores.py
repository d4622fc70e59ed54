"""Stores whose curvature G is taken at other positions, or of other conversations, than `calibrate` takes.

Each way puts another step in the place of one of `calibrate` while it runs; none is an option of it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch

from deltaguard.chat.conversations import Conversation, harmful_prompts, held_out_harmless
from deltaguard.chat.framings import framed
from deltaguard.chat.generation import generate
from deltaguard.chat.template import render
from deltaguard.chat.tokens import Batch, Encoded, batches
from deltaguard.curvature import calibrate as calibration
from deltaguard.curvature import request
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import LOOK_ALIKE_TOKENS, CalibrateConfig
from deltaguard.curvature.responses import is_answer_missing, respond
from deltaguard.evaluation.probes.wrappers import LANGUAGES, translated_prompts

CONFIG = CalibrateConfig(max_new_tokens=32, resume=True)

HALF_AFTER = 8
"""Response tokens after which a position weighs half of what the first one does."""

FOLLOWING = 32
"""Tokens that are written on after an answer."""

STYLES = (
    "Could you please help me with something? {} Thank you very much in advance.",
    "I have worked on this since the morning, and I would like to be done before supper. {}",
    "You are a retired expert who talks freely with a young visitor. The visitor asks: {}",
    "Do as you are told, and at once: {}",
)


def first(count: int) -> Callable[[Batch], Batch]:
    """Keep the first positions of each response."""
    return lambda batch: replace(batch, answering=batch.answering & (batch.answering.cumsum(dim=1) <= count))


def weighted(batch: Batch) -> Batch:
    """Draw each position with the probability of its weight, 8 / (8 + tokens before it)."""
    before = batch.answering.cumsum(dim=1) - 1
    drawn = torch.rand(batch.answering.shape, generator=torch.Generator().manual_seed(int(batch.ids.sum())))
    return replace(batch, answering=batch.answering & (drawn < HALF_AFTER / (HALF_AFTER + before)))


def styled(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Put requests into one style after another."""
    turn = itertools.cycle(STYLES)
    return [replace(row, prompt=next(turn).format(row.prompt)) for row in conversations]


def in_other_languages(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Put requests in other languages in the place of those given, which are harmful throughout or harmless.

    The harmful ones are the translations that `deltaguard eval` asks, in German, Spanish and Swahili; the
    others are held out for the dial, in German, Spanish, French and Chinese. None is asked here.
    """
    if conversations[0].prompt in {row.prompt for row in harmful_prompts("calibration")}:
        other = [row.prompt for language in LANGUAGES for row in translated_prompts(language)]
    else:
        other = [row.prompt for row in held_out_harmless() if row.language != "en"]
    return [replace(row, prompt=prompt) for row, prompt in zip(conversations, other, strict=False)]


def going_on(model: Any, tokenizer: Any, rows: Sequence[Conversation], **options: Any) -> list[Conversation]:
    """Let the model answer harmful requests, and write on after each answer, as if it had not ended its turn.

    Look-alikes, of which few tokens are asked, and conversations held out end where they end.
    """
    answered = respond(model, tokenizer, rows, **options)
    if options["max_new_tokens"] <= LOOK_ALIKE_TOKENS:
        return answered
    continued = answered[: -CONFIG.num_held_out]
    read = [f"{render(tokenizer, replace(row, response=None))}{row.response}\n\n" for row in continued]
    batch = options["batch_size"]
    further = generate(model, tokenizer, read, max_new_tokens=FOLLOWING, batch_size=batch)
    longer = [
        replace(row, response=f"{row.response}\n\n{more}", response_ids=None)
        for row, more in zip(continued, further, strict=True)
    ]
    return [*longer, *answered[-CONFIG.num_held_out :]]


def calibrated(
    name: str,
    *,
    positions: Callable[[Batch], Batch] = lambda batch: batch,
    framing: Callable[[Sequence[Conversation]], list[Conversation]] = list,
    answer: Callable[..., list[Conversation]] = respond,
) -> Callable[[Path, Path], Path]:
    """Calibrate as `deltaguard calibrate` does, but for what is given.

    Args:
        name: of the store's folder.
        positions: changes what G is taken at; H is as it was.
        framing: changes half of the requests; as it is, no request stands in a framing.
        answer: lets the model answer.
    """

    def those(texts: Sequence[Encoded], size: int) -> list[Batch]:
        return [positions(batch) for batch in batches(texts, size)]

    def is_missing(conversations: Sequence[Conversation], journal: Path) -> bool:
        # The model may write on what an earlier run answered.
        return answer is not respond or is_answer_missing(conversations, journal)

    def make(aligned: Path, folder: Path) -> Path:
        with (
            patch.object(calibration, "batches", those),
            patch.object(calibration, "respond", answer),
            patch.object(calibration, "is_answer_missing", is_missing),
            patch.object(request, "framed", framing),
        ):
            calibrate(aligned, folder / name, config=CONFIG)
        return folder / name

    return make


CURVATURES: Mapping[str, Callable[[Path, Path], Path]] = MappingProxyType(
    {
        "all response tokens": calibrated("store"),
        **{
            f"the first {count}": calibrated(f"store-{count}", positions=first(count)) for count in (4, 8, 16)
        },
        "positions weighed 8 / (8 + t)": calibrated("store-weighted", positions=weighted),
        "all, and what follows": calibrated("store-following", answer=going_on),
        "half of the requests in four styles": calibrated("store-styles", framing=styled),
        "half of them in other languages": calibrated("store-languages", framing=in_other_languages),
        "half of them in framings": calibrated("store-framings", framing=framed),
    }
)
"""Ways to take the curvature, each given the aligned model and a folder for stores; the last: by default."""
