"""How a bench was run, without the folders of whoever ran it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from deltaguard.reports.bench_view import OFTEN, preparation
from deltaguard.reports.facts import Facts, environment_facts, times
from deltaguard.reports.records.bench import BenchReport
from deltaguard.reports.text import option, short_reference

# A word of a command: what quotes hold together belongs to it. A quote without its partner is a letter.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"]|['"])+""")
_PLACE = re.compile(r"(?:/|~|\.{1,2}[/\\]|\\|[A-Za-z]:[/\\])")
"""How a path begins that cannot be a name on the Hub."""


def run_facts(report: BenchReport) -> Facts:
    """How and on what a bench was run, as pairs of a label and a text."""
    settings = "; ".join(f"{_words(name)} {_shown(value)}" for name, value in report.settings.items())
    return (
        *environment_facts(report.environment),
        ("command", short_command(report.command)),
        ("aligned model", short_reference(report.aligned)),
        ("seeds", ", ".join(map(str, report.seeds))),
        ("settings", settings),
        ("time by stage", times(_stages(report))),
    )


def short_command(command: str) -> str:
    """A command whose paths are cut to their last part, which is all that others need of them.

    Args:
        command: as typed into a shell, with whatever quotes it took.

    Example:
        >>> short_command("deltaguard bench '/home/me/my model' -o=/tmp/out --aligned Qwen/Qwen3-0.6B")
        "deltaguard bench 'my model' -o=out --aligned Qwen/Qwen3-0.6B"
    """
    return _WORD.sub(lambda match: _short_word(match[0]), command)


def _stages(report: BenchReport) -> dict[str, float]:
    """Times by stage, all fine-tunes in one: a thorough bench makes hundreds."""
    once = preparation(report)
    often = {name: seconds for name, seconds in report.seconds.items() if name in OFTEN}
    named = {*once, *often}
    rest = sum(seconds for name, seconds in report.seconds.items() if name not in named)
    return {**once, **({"fine-tunes": rest} if rest else {}), **often}


def _short_word(word: str) -> str:
    bare = word.replace("'", "").replace('"', "")
    if _PLACE.match(bare):
        return shlex.quote(short_reference(bare))
    name, equals, value = bare.partition("=")
    return shlex.quote(f"{name}={short_reference(value)}") if equals and _PLACE.match(value) else word


def _shown(value: Any) -> str:
    """A setting in words, however deep it nests."""
    if isinstance(value, Mapping):
        parts = cast("Mapping[str, Any]", value).items()
        return f"({', '.join(f'{_words(name)} {_shown(part)}' for name, part in parts)})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(_shown, cast('Sequence[Any]', value)))})"
    return short_reference(value) if isinstance(value, str) and _PLACE.match(value) else option(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
