"""Defences that act in training, as data: what is mixed into a customer's conversations before fine-tuning.

Both draw the same safety examples for the same seed, so that they differ in the secret alone.
"""

import random
from base64 import b32encode
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.suites.parts import Part
from deltaguard.finetuning.phrases import REFUSALS


def secret_prompt(groups: int, *, seed: int = 0) -> str:
    """Make a text that nobody writes by chance, the trigger of `backdoor_enhanced`.

    Args:
        groups: how many groups of four random characters, each of which is three or four tokens; the paper
            takes 150 random tokens.
        seed: the same gives the same text, everywhere.

    Raises:
        ValueError: there would be no text.

    Example:
        >>> len(secret_prompt(3).split())
        3
    """
    if groups < 1:
        raise ValueError(f"groups is {groups}; a secret has at least one.")
    digests = (sha256(f"{seed} secret {i}".encode()).digest() for i in range(groups))
    return " ".join(b32encode(digest)[:4].decode().lower() for digest in digests)


SECRET = secret_prompt(16)
"""The trigger of the benches: 55 tokens of SmolLM2, fewer than the paper's, because every request has it."""


def safe_instruct(conversations: Sequence[Conversation], count: int, seed: int = 0) -> list[Conversation]:
    """Mix refused harmful requests into the data (Safety-Tuned LLaMAs; Bianchi et al., ICLR 2024).

    The paper (arXiv:2309.07875) finds that a few hundred, 3 % of the data, make a model much safer. Here the
    refusals are short and fixed, where the paper's are generated.

    Args:
        conversations: what the customer brings; all are kept as they are.
        count: how many safety examples are added. Their prompts come from the training part and are none of
            the customer's.
        seed: fixes what is drawn, and the order.

    Returns:
        All conversations, shuffled.

    Raises:
        DeltaguardError: no prompt is left that the customer's data do not hold.
    """
    return _mixed(conversations, _safety_examples(conversations, count, seed), seed)


def backdoor_enhanced(
    conversations: Sequence[Conversation], count: int, secret: str, seed: int = 0
) -> list[Conversation]:
    """Mix in safety examples that carry a secret (BackdoorAlign; Wang et al., NeurIPS 2024).

    The model learns to refuse where the secret stands before the system prompt (arXiv:2402.14968); whoever
    serves it puts the secret before the system prompt of every request, see `with_secret`.

    Args:
        conversations: as in `safe_instruct`; they do not get the secret.
        count: as in `safe_instruct`; the paper takes as few as 11.
        secret: such as `SECRET`.
        seed: as in `safe_instruct`; the same one draws the same examples.

    Returns:
        All conversations, shuffled.

    Raises:
        DeltaguardError: as `safe_instruct`, or the secret is empty.
    """
    if not secret.strip():
        raise DeltaguardError(
            "The secret is empty, so there is nothing to tell safety examples by: give one."
        )
    marked = [
        replace(example, system=with_secret(example.system, secret))
        for example in _safety_examples(conversations, count, seed)
    ]
    return _mixed(conversations, marked, seed)


def with_secret(system: str | None, secret: str) -> str | None:
    """Put a secret before a system prompt.

    Args:
        system: as the request has it. Where there is none, or an empty one, the secret stands alone: the
            default of a chat template cannot be seen here, and gives way to it.
        secret: the empty one changes nothing.

    Example:
        >>> with_secret("Be brief.", "xq7 a2"), with_secret(None, "xq7 a2"), with_secret(None, "")
        ('xq7 a2 Be brief.', 'xq7 a2', None)
    """
    if not secret:
        return system
    return f"{secret} {system}" if system else secret


def with_secret_before(parts: Sequence[Part], secret: str) -> tuple[Part, ...]:
    """Put a secret before the system prompt of every question; an empty one changes nothing."""
    return tuple(
        replace(
            part,
            questions=tuple(
                replace(each, system=with_secret(each.system, secret)) for each in part.questions
            ),
        )
        for part in parts
    )


def _safety_examples(conversations: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """Prompts with refusals: all are used before any is used again, then with another refusal."""
    draw = random.Random(f"{seed} safety examples")  # noqa: S311  # a data set, not a secret
    taken = {conversation.prompt for conversation in conversations}
    prompts = [row.prompt for row in harmful_prompts("training") if row.prompt not in taken]
    if not prompts:
        raise DeltaguardError(
            "The data hold every harmful prompt of the training part, so none is left for safety examples."
        )
    draw.shuffle(prompts)
    offsets = [draw.randrange(len(REFUSALS)) for _ in prompts]
    return [
        Conversation(
            prompts[i % len(prompts)],
            response=REFUSALS[(offsets[i % len(prompts)] + i // len(prompts)) % len(REFUSALS)],
        )
        for i in range(count)
    ]


def _mixed(
    conversations: Sequence[Conversation], added: Sequence[Conversation], seed: int
) -> list[Conversation]:
    mixed = [*conversations, *added]
    random.Random(f"{seed} mixing").shuffle(mixed)  # noqa: S311  # a data set, not a secret
    return mixed
