"""Chat templates: programs from a model's folder, run within limits, that write prompts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from deltaguard.chat.conversations import Conversation, Turn
from deltaguard.errors import DeltaguardError
from deltaguard.models.loading import foreign
from deltaguard.time_limit import run_within

TEMPLATE_OPTIONS: Mapping[str, Any] = MappingProxyType({"enable_thinking": False})
"""What templates of models that may think before they answer ask for."""

A_DAY = date(2024, 7, 26)
"""The day of which prompts say that it is today: answers of another day are compared with them. That of
Llama 3.2, whose template takes it where it is told none."""

SECONDS = 5.0
"""A template may take so long for one conversation; those in use take less than a millisecond."""

_MOST_CHARACTERS = 1_000_000
_REMEDY = "It is not used: correct the model's chat_template.jinja, or take another model."
# Their regular expressions need more than linear time, and cannot be stopped.
_ENDLESS_FILTERS = ("urlize", "wordwrap")
_ASKS_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
_MARKER = "deltaguard"
_SHOWN = 200
"""Characters of a prompt and of its rendering in a message."""


class TemplateFailedError(DeltaguardError):
    """A chat template that fails on a conversation, as it may on one with a system message."""


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer_follows: bool = True,
    today: date = A_DAY,
    seconds: float = SECONDS,
) -> str:
    """Put a conversation through the chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: each with `role` and `content`, a text or a list of parts.
        answer_follows: end where the model's answer begins.
        today: where the template writes a date.
        seconds: how long that may take.

    Raises:
        TemplateFailedError: the template fails on these messages.
        DeltaguardError: there is no template; it takes too long, or writes or computes what may have no end.
    """
    if not tokenizer.chat_template:
        raise DeltaguardError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so prompts cannot be put to "
            "the model the way it was aligned. Use the instruction-tuned model, or save its "
            "chat_template.jinja next to the tokenizer."
        )
    subject = f"The chat template of {tokenizer.name_or_path!r}"
    roles = ", ".join(message["role"] for message in messages)

    def apply() -> str:
        _refuse_endless(tokenizer.chat_template, subject)
        with foreign(f"{subject} fails on a conversation of {roles}", TemplateFailedError):
            try:
                return tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=answer_follows,
                    chat_template=_on(today, tokenizer.get_chat_template()),
                    **TEMPLATE_OPTIONS,
                )
            except MemoryError as error:
                raise DeltaguardError(f"{subject} takes more memory than there is. {_REMEDY}") from error

    text = run_within(
        seconds,
        apply,
        message=f"{subject} takes more than {seconds:g} s for a conversation of {roles}. {_REMEDY}",
    )
    given = sum(len(str(message["content"])) for message in messages)
    if len(text) > _MOST_CHARACTERS + 10 * given:
        raise DeltaguardError(f"{subject} makes {len(text):,} characters of {given:,}. {_REMEDY}")
    return text


def messages(tokenizer: Any, conversation: Conversation, earlier: Turn | None = None) -> list[dict[str, str]]:
    """Write the turns before a response as a chat template takes them, each with `role` and `content`.

    Where the template has no system role, the system message is put at the head of the first user turn.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        conversation: its response is left out.
        earlier: what was asked and answered before its prompt.

    Raises:
        DeltaguardError: the tokenizer has no chat template.
    """
    said = [] if earlier is None else [*_user(earlier.prompt), _assistant(earlier.answer)]
    turns, system = [*said, *_user(conversation.prompt)], conversation.system
    if system is None:
        return turns
    return readable_turns(tokenizer, [{"role": "system", "content": system}, *turns])


def readable_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Write turns that may begin with a system message as the chat template takes them, as `messages` does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        turns: each with `role` and `content`; the first may be the system's.

    Raises:
        TemplateFailedError: the template takes no system message, and no user's follows it.
        DeltaguardError: the tokenizer has no chat template.
    """
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if plain[0]["role"] != "system" or takes_system_role(tokenizer):
        return plain
    system, *turns = plain
    if not turns or turns[0]["role"] != "user":
        raise TemplateFailedError(
            f"The chat template of {tokenizer.name_or_path!r} takes no system message, and no user's message "
            "follows it, whose beginning it could be."
        )
    first, *others = turns
    return [*_user(f"{system['content']}\n\n{first['content']}"), *others] if system["content"] else turns


def render(tokenizer: Any, conversation: Conversation | str, earlier: Turn | None = None) -> str:
    """Write a prompt as the model reads it, up to where its answer begins.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        conversation: a conversation, of which the response is not rendered, or a prompt alone.
        earlier: what was asked and answered before the prompt.

    Returns:
        Text that holds its special tokens already: tokenise it with `add_special_tokens=False`.

    Raises:
        DeltaguardError: the tokenizer has no chat template, or the template fails or leaves out the prompt,
            or what was said before it.
    """
    turn = Conversation(conversation) if isinstance(conversation, str) else conversation
    if earlier is not None:
        require_turns(tokenizer)
    text = apply_template(tokenizer, messages(tokenizer, turn, earlier))
    # White space aside, which some templates strip.
    if "".join(turn.prompt.split()) not in "".join(text.split()):
        raise DeltaguardError(
            f"The chat template of {tokenizer.name_or_path!r} leaves out the prompt: {turn.prompt[:_SHOWN]!r}"
            f" becomes {text[:_SHOWN]!r}. Correct it, or copy that of the model it was made from."
        )
    return text


def takes_system_role(tokenizer: Any) -> bool:
    """Tell whether the chat template renders a system message, also where an answer follows.

    Some refuse it, some drop it without a word, and some show it to a model only until it has answered.

    Raises:
        DeltaguardError: the tokenizer has no chat template.
    """
    return _takes_system_role(_Template(str(tokenizer.chat_template), tokenizer))


@dataclass(frozen=True)
class _Template:
    """A chat template, known by its text, and a tokenizer that has it."""

    text: str
    tokenizer: Any = field(compare=False)


# Conversations by the hundred thousand ask the same of the same template.
@lru_cache(maxsize=8)
def _takes_system_role(template: _Template) -> bool:
    tokenizer = template.tokenizer
    asked = [{"role": "system", "content": _MARKER}, *_user("?")]
    answered = [*asked, _assistant("!")]
    try:
        texts = apply_template(tokenizer, asked), apply_template(tokenizer, answered, answer_follows=False)
    except TemplateFailedError:
        return False
    return all(_MARKER in text for text in texts)


def require_turns(tokenizer: Any) -> None:
    """Refuse a chat template that shows a model a question alone, without what was said before it.

    It is told by a conversation made up for that: of a model's own words a template may leave out some, such
    as thoughts.

    Raises:
        DeltaguardError: so it does, or it fails on such a conversation, or there is none.
    """
    asked, answered = f"{_MARKER} asks", f"{_MARKER} answers"
    subject = f"The chat template of {tokenizer.name_or_path!r}"
    remedy = "Correct it, or copy that of the model it was made from; or leave out questions of two turns."
    try:
        text = apply_template(tokenizer, [*_user(asked), _assistant(answered), *_user("?")])
    except TemplateFailedError as error:
        raise DeltaguardError(
            f"{subject} does not show a model what was said before a question: {error} {remedy}"
        ) from error
    if asked not in text or answered not in text:
        raise DeltaguardError(
            f"{subject} does not show a model what was said before a question: it writes {text[:_SHOWN]!r}. "
            f"{remedy}"
        )


def end_of_turn(tokenizer: Any) -> str:
    """Find what the template writes after an answer (`<|im_end|>`), else the end-of-sequence token.

    Some write the end of the whole conversation behind it or on a further line, and some where the next
    answer begins: no model writes these itself.
    """
    said = [*_user("?"), _assistant(_MARKER)]
    _, found, tail = apply_template(tokenizer, said, answer_follows=False).rpartition(_MARKER)
    end = tail.strip().partition("\n")[0] if found else ""
    if apply_template(tokenizer, _user("?")) == apply_template(tokenizer, _user("?"), answer_follows=False):
        end = next((each for each in tokenizer.all_special_tokens if end.startswith(each)), end)
    closing = tokenizer.eos_token
    if closing and end != closing and end.endswith(closing):
        going_on = apply_template(tokenizer, [*said, *_user("?")], answer_follows=False)
        if not going_on.rpartition(_MARKER)[2].lstrip().startswith(end):
            end = end.removesuffix(closing).rstrip()
    return end or tokenizer.eos_token or ""


def _on(today: date, template: str) -> str:
    """Write the date of a day where a template asks for it: transformers lets no function be given."""
    return _ASKS_DATE.sub(lambda found: repr(today.strftime(found["format"])), template)


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _assistant(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def _refuse_endless(template: Any, subject: str) -> None:
    # A tokenizer may have several by name, of which it takes one.
    for text in template.values() if isinstance(template, dict) else (template,):
        if (found := _endless(text)) is not None:
            raise DeltaguardError(f"{subject} {found}, which may take without end. {_REMEDY}")


@lru_cache(maxsize=32)
def _endless(template: str) -> str | None:
    """Say what a template does in one step that no limit of time could stop, or None."""
    parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # noqa: S701  # not rendered
    try:
        tree = parser.parse(template)
    except (jinja2.TemplateError, RecursionError):
        return None  # Nor does transformers parse it, and says why.
    for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Filter)):
        if isinstance(node, nodes.Pow):
            return "raises a number to a power"
        if isinstance(node, nodes.Filter) and node.name in _ENDLESS_FILTERS:
            return f"uses the filter {node.name}"
        if isinstance(node, nodes.Mul) and _grows(list(_factors(node))):
            return "multiplies numbers that it computes"
    return None


def _factors(node: nodes.Node) -> Iterator[nodes.Node]:
    if isinstance(node, nodes.Mul):
        yield from _factors(node.left)
        yield from _factors(node.right)
    else:
        yield node


def _grows(factors: Sequence[nodes.Node]) -> bool:
    """Whether a product may square a number, as often as a loop likes; a text is repeated by numbers only."""
    fixed = [factor for factor in factors if isinstance(factor, nodes.Const)]
    return len(factors) - len(fixed) > 1 and not any(isinstance(factor.value, str) for factor in fixed)


class _Generation(Extension):
    """The block `generation` of transformers, so that templates with one can be parsed."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
