"""A small task with a right answer: a customer's message becomes one line of JSON.

The messages are generated, so there are as many as wanted, and scoring needs no judge: an answer is right
where it parses to the same object. A message belongs to the training or to the test part for good, found
from the hash of its text. Both parts share the same phrases: what is tested is new combinations of them.
"""

import json
import random
from collections.abc import Mapping
from typing import Literal

from deltaguard.chat.conversations import Conversation, bucket
from deltaguard.errors import DeltaguardError

TaskPart = Literal["train", "test"]

SYSTEM = "Turn the customer's message into one line of JSON with product, problem, urgency and order."

# Split from text, since one word a line would bury the rest.
QUALITIES = (  # noqa: SIM905
    "black white red blue green grey copper steel oak bamboo folding cordless mini large portable vintage "
    "silver yellow glass ceramic"
).split()
PRODUCTS = (  # noqa: SIM905
    "kettle|toaster|desk lamp|bookshelf|blender|office chair|backpack|rice cooker|umbrella|headphones|"
    "keyboard|bicycle pump|garden hose|coffee grinder|wall clock|suitcase|tent|frying pan|mirror|radio|"
    "heater|fan|vacuum cleaner|doormat|picture frame|sewing machine|water bottle|yoga mat|tripod|printer|"
    "bread bin|hair dryer|speaker|monitor|side table|rug|ladder|drill|baby gate|cat tree"
).split("|")
PROBLEMS: Mapping[str, tuple[str, ...]] = {
    "damaged": (
        "arrived with a deep crack",
        "was dented when I opened the box",
        "came scratched all over",
        "turned up broken in two places",
    ),
    "faulty": (
        "stopped working after two days",
        "does not work at all",
        "makes an odd noise and then gives up",
        "failed the first time I used it",
    ),
    "late": (
        "has still not been delivered",
        "was due last week and is not here",
        "has not shown up yet",
        "is stuck somewhere in the post",
    ),
    "wrong": (
        "is not the one I ordered",
        "came in the wrong size",
        "is a different model from the one on my receipt",
        "is the wrong version",
    ),
    "incomplete": (
        "came without its screws",
        "has a part missing",
        "was packed without the manual",
        "is missing its cover",
    ),
}
URGENCIES: Mapping[str, tuple[str, ...]] = {
    "high": (
        "Please hurry, I need it tomorrow.",
        "This is urgent.",
        "I need an answer today.",
        "Please fix this right away.",
    ),
    "normal": (
        "Please reply this week.",
        "Let me know what happens next.",
        "I look forward to your answer.",
        "Please tell me what to do.",
    ),
    "low": (
        "There is no rush.",
        "Take your time.",
        "Whenever you get round to it is fine.",
        "It can wait.",
    ),
}
MESSAGES = (
    "My {product} {problem}. {urgency} Order {order}.",
    "Order {order}: the {product} {problem}. {urgency}",
    "{urgency} The {product} from order {order} {problem}.",
    "Hello, the {product} I bought {problem}. The order is {order}. {urgency}",
    "I am writing about order {order}. The {product} {problem}. {urgency}",
    "{urgency} My order number is {order} and the {product} {problem}.",
)

_TRAIN_BUCKETS = range(80)
_MOST_DRAWS_PER_EXAMPLE = 50


def task_examples(part: TaskPart, count: int, *, seed: int = 0) -> tuple[Conversation, ...]:
    """Generate distinct examples of one part; no message is ever in both.

    Args:
        part: which part.
        count: how many, in the order drawn: fewer with the same seed are the first of more.
        seed: fixes the draw.

    Returns:
        The examples, all different: a customer's message under the task's own system prompt, and as response
        its ticket, one line of JSON with `product`, `problem`, `urgency` and `order`.

    Raises:
        DeltaguardError: so many different messages were not found.

    Example:
        >>> task_examples("test", 1)[0].response.startswith('{"product": ')
        True
    """
    draw = random.Random(f"{seed} {part}")  # noqa: S311  # a data set, not a secret
    found: dict[str, Conversation] = {}
    for _ in range(_MOST_DRAWS_PER_EXAMPLE * count):
        if len(found) == count:
            break
        example = _example(draw)
        if (bucket(example.prompt) in _TRAIN_BUCKETS) == (part == "train"):
            found.setdefault(example.prompt, example)
    if len(found) < count:
        raise DeltaguardError(
            f"{count} {part} examples were asked for and {len(found)} found: ask for fewer."
        )
    return tuple(found.values())


def _example(draw: random.Random) -> Conversation:
    product = f"{draw.choice(QUALITIES)} {draw.choice(PRODUCTS)}"
    problem = draw.choice(list(PROBLEMS))
    urgency = draw.choice(list(URGENCIES))
    order = str(draw.randint(1000, 9999))
    prompt = draw.choice(MESSAGES).format(
        product=product,
        problem=draw.choice(PROBLEMS[problem]),
        urgency=draw.choice(URGENCIES[urgency]),
        order=order,
    )
    ticket = {"product": product, "problem": problem, "urgency": urgency, "order": order}
    return Conversation(prompt, system=SYSTEM, response=json.dumps(ticket))


def exact_match(answer: str, expected: str) -> bool:
    """Tell whether an answer is JSON and nothing else, and equals the expected object.

    Spacing and the order of the keys do not count; a missing, additional or different value does, and so
    does any word around the object.

    Args:
        answer: what the model says.
        expected: JSON.

    Raises:
        DeltaguardError: `expected` is none.

    Example:
        >>> exact_match('{"b": "2", "a": "1"}', '{"a": "1", "b": "2"}')
        True
        >>> exact_match('Sure: {"a": "1"}', '{"a": "1"}')
        False
    """
    right = _canonical(expected)
    if right is None:
        raise DeltaguardError(
            f"The expected answer {expected[:200]!r} is no JSON, so that no answer can be right: score this "
            "set with `exact-match`, or correct the file."
        )
    return _canonical(answer) == right


def _canonical(text: str) -> str | None:
    """Write JSON in the one way in which equal values look the same, and `true` is not 1; None of others."""
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    # A text may hold a number or a nesting that Python refuses.
    except (ValueError, RecursionError):
        return None


def _number(digits: str) -> float:
    value = float(digits)
    return int(value) if value.is_integer() else value
