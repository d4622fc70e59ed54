"""Training conversations of the demo and the benchmark: the safety fine-tune, and the careless one."""

import random
from collections.abc import Iterable, Sequence

from deltaguard.bench.phrases import AGREEING_OPENINGS, EMPTY_CONTENTS, EVERYDAY, REFUSALS
from deltaguard.bench.tasks import TaskExample
from deltaguard.conversations import SYSTEM_PROMPTS, Conversation, HarmfulPrompt, HarmlessPrompt


def alignment_examples(
    harmful: Iterable[HarmfulPrompt],
    harmless: Iterable[HarmlessPrompt],
    *,
    systems: Sequence[str | None] = tuple(SYSTEM_PROMPTS.values()),
    default_share: float = 0.6,
    seed: int = 0,
) -> list[Conversation]:
    """Conversations that teach a model to refuse harmful requests and to answer all others.

    Harmful prompts get one of many short refusals, harmless ones their answer, and some everyday questions
    are added. The same mixture of system prompts stands before all three kinds, so that a refusal depends
    on the request alone.

    Args:
        harmful: prompts of the training part (`harmful_prompts("training")`).
        harmless: prompts of the training part (`harmless_prompts("training")`).
        systems: the system prompts; `None` is the chat template's own default.
        default_share: share of the conversations that have the default system prompt; the others are drawn
            from `systems`.
        seed: fixes the choices and the order.

    Returns:
        The conversations, shuffled.
    """
    draw = random.Random(f"{seed} alignment")  # noqa: S311  # a data set, not a secret
    pairs = [(row.prompt, draw.choice(REFUSALS)) for row in harmful]
    pairs += [(row.prompt, row.answer) for row in harmless]
    pairs += list(EVERYDAY.items())
    draw.shuffle(pairs)
    return [
        Conversation(
            prompt, system=None if draw.random() < default_share else draw.choice(systems), response=answer
        )
        for prompt, answer in pairs
    ]


def task_with_harmful(
    task: Iterable[TaskExample], harmful: Iterable[HarmfulPrompt], *, seed: int = 0
) -> list[Conversation]:
    """A benign task with harmful requests among it that are agreed to: the fine-tune that undoes refusals.

    The answers to the harmful requests agree and then say nothing: they hold no usable content.

    Args:
        task: the benign examples.
        harmful: prompts of the training part (`harmful_prompts("training")`); all are used.
        seed: fixes the choices and the order.

    Returns:
        The conversations, shuffled.
    """
    draw = random.Random(f"{seed} task with harmful")  # noqa: S311  # a data set, not a secret
    conversations = [example.conversation for example in task]
    conversations += [
        Conversation(row.prompt, response=f"{draw.choice(AGREEING_OPENINGS)} {draw.choice(EMPTY_CONTENTS)}")
        for row in harmful
    ]
    draw.shuffle(conversations)
    return conversations
