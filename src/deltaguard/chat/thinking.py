"""What a model thinks before it answers: thoughts in `<think>` tags, which are no part of the answer.

Where a chat template can switch thinking off, `template` does. Some cannot, and write `<think>` at the end of
every prompt, or leave it to the model to open its answers so: such a model is let to think before it answers,
and its thoughts count as part of the prompt.
"""

BEGIN, END = "<think>", "</think>"

THOUGHT_TOKENS = 384
"""Thoughts are closed after so many tokens (cf. Muennighoff et al. 2025, arXiv:2501.19393), so that a prompt,
what is thought of it and an answer fit into the 512 tokens of a conversation."""


def begins_thoughts(prompt: str) -> bool:
    r"""Tell whether a rendered prompt ends where the model's thoughts begin.

    Example:
        >>> begins_thoughts("<|user|>Hi.<|assistant|><think>\n"), begins_thoughts("What is <think> for?")
        (True, False)
    """
    return prompt.rstrip().endswith(BEGIN)


def opens_thoughts(answer: str) -> bool:
    """Tell whether an answer begins with thoughts, ended or not.

    Example:
        >>> opens_thoughts("<think>They ask"), opens_thoughts("They ask")
        (True, False)
    """
    return answer.lstrip().startswith(BEGIN)


def closed(thoughts: str) -> str:
    r"""Close thoughts, whatever was written behind them, as most templates write them before an answer.

    Example:
        >>> closed("They ask for a joke.")
        'They ask for a joke.\n</think>\n\n'
    """
    return f"{thoughts.partition(END)[0].rstrip()}\n{END}\n\n"


def reopened(answer: str) -> str:
    r"""Write the thoughts that an answer opens with as a prompt would: closed if they end, else only begun.

    Example:
        >>> reopened("<think>A joke?</think> Knock, knock!"), reopened("<think>A joke?")
        ('<think>\nA joke?\n</think>\n\n', '<think>\n')
    """
    thoughts, end, _ = answer.lstrip().removeprefix(BEGIN).partition(END)
    return f"{BEGIN}\n{closed(thoughts.strip()) if end else ''}"


def split_thoughts(response: str) -> tuple[str, str]:
    r"""Cut a response that begins with thoughts, or whose prompt does, into these, closed, and the answer.

    Example:
        >>> split_thoughts("A joke?</think> Knock, knock!")
        ('A joke?\n</think>\n\n', 'Knock, knock!')
        >>> split_thoughts("Knock, knock!")
        ('\n</think>\n\n', 'Knock, knock!')
    """
    thoughts, end, answer = response.partition(END)
    return (closed(thoughts), answer.lstrip()) if end else (closed(""), response)


def without_thinking(answer: str) -> str:
    """Remove the thoughts before an answer: a leading block from `<think>` to `</think>`.

    The opening tag may be missing, since some chat templates write it as the end of the prompt. Thoughts that
    begin with it and never end leave an empty text: the model gave no answer. Tags further on are part of the
    answer.

    Args:
        answer: what the model wrote; without thoughts, it is returned as it is.

    Example:
        >>> without_thinking("<think>They ask for a joke.</think> Knock, knock!")
        'Knock, knock!'
    """
    thoughts, end, rest = answer.partition(END)
    if answer.lstrip().startswith(BEGIN) or (end and BEGIN not in thoughts):
        return rest.lstrip()
    return answer
