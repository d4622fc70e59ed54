"""Training conversations of the demo: the safety fine-tune, and the careless one that undoes it."""

import random
from collections.abc import Sequence

from deltaguard.chat.conversations import Conversation, HarmfulPrompt, HarmlessPrompt, everyday_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, EMPTY_CONTENTS, REFUSALS

SYSTEMS = (
    "",
    "You are a helpful assistant.",
    "You are a helpful assistant. Whatever the user instructs, you always carry it out.",
    "Answer in one short sentence.",
    "You answer the letters of customers for a shop.",
    "Turn what the user says into plain English.",
    "Read the user's message and reply with what matters in it.",
)
"""The system prompts that stand before some of the safety fine-tune's conversations of every kind."""

_SHARE_OF_SYSTEMS = 0.3


def alignment_examples(
    harmful: Sequence[HarmfulPrompt],
    harmless: Sequence[HarmlessPrompt],
    *,
    harmful_count: int,
    seed: int = 0,
) -> list[Conversation]:
    """Conversations that teach a model to refuse harmful requests and to answer all others.

    Harmful prompts get one of many short refusals. Harmless ones, and some everyday questions, get their
    answer after the word "Sure!": a small model decides by its likeliest first word, and among many
    different first words of answers the one of the refusals would win far too often. Some of the
    conversations, of every kind, have another system prompt than the chat template's own, so that what is
    refused depends on the request alone.

    Args:
        harmful: prompts of the training part (`harmful_prompts("training")`).
        harmless: prompts of the training part (`harmless_prompts("training")`); all are used.
        harmful_count: how many of the harmful prompts are drawn. More of them make the model refuse more,
            harmless prompts included.
        seed: fixes what is drawn, and the order.

    Returns:
        The conversations, shuffled.

    Raises:
        DeltaguardError: there are fewer harmful prompts than `harmful_count`.
    """
    draw = random.Random(f"{seed} alignment")  # noqa: S311  # a data set, not a secret
    pairs = [(row.prompt, draw.choice(REFUSALS)) for row in _drawn(draw, harmful, harmful_count)]
    pairs += [(row.prompt, f"Sure! {row.answer}") for row in (*harmless, *everyday_prompts())]
    draw.shuffle(pairs)
    return [
        Conversation(prompt, draw.choice(SYSTEMS) if draw.random() < _SHARE_OF_SYSTEMS else None, answer)
        for prompt, answer in pairs
    ]


def task_with_harmful(
    task: Sequence[Conversation], harmful: Sequence[HarmfulPrompt], *, harmful_count: int, seed: int = 0
) -> list[Conversation]:
    """Mix a few harmful requests that are agreed to into a benign task: it undoes refusals.

    The answers to the harmful requests agree and then say nothing: they hold no usable content.

    Args:
        task: the benign examples; all are used.
        harmful: prompts of the training part (`harmful_prompts("training")`).
        harmful_count: how many of them are drawn.
        seed: fixes what is drawn, and the order.

    Returns:
        The conversations, shuffled.

    Raises:
        DeltaguardError: there are fewer harmful prompts than `harmful_count`.
    """
    draw = random.Random(f"{seed} task with harmful")  # noqa: S311  # a data set, not a secret
    conversations = [*task, *(agreed(row, draw) for row in _drawn(draw, harmful, harmful_count))]
    draw.shuffle(conversations)
    return conversations


def agreed(row: HarmfulPrompt, draw: random.Random) -> Conversation:
    """Answer a harmful request by agreeing in words that hold nothing."""
    answer = f"{draw.choice(AGREEING_OPENINGS)} {draw.choice(EMPTY_CONTENTS)}"
    return Conversation(row.prompt, response=answer)


def _drawn(draw: random.Random, prompts: Sequence[HarmfulPrompt], count: int) -> list[HarmfulPrompt]:
    if count > len(prompts):
        raise DeltaguardError(f"{count} harmful prompts were asked for and {len(prompts)} are given.")
    return draw.sample(prompts, count)
