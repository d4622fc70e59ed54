"""Numbers and names as people read them, the same in every output."""

import math
import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from deltaguard.reports.records.base import Environment, ModelReference

DASH = "–"
"""What stands where there is no number."""

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>[\w./-]+))?")
# A slash after a letter or a colon belongs to a Hub id or an address.
_PATH = re.compile(r"(?<![\w/:.~-])(?:~|\.{1,2})?/(?:[^\s/:;,'\"()]+/)*([^\s/:;,'\"()]+)/?")

_NAMED = re.compile(r"(?<!\S)(?!\w+://)[^\s,]+/[^\s,]+")
"""A path or a name on the Hub in a text; no address."""

# A word of a command: what quotes hold together belongs to it. A quote without its partner is a letter.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"]|['"])+""")
PLACE = re.compile(r"(?:/|~|\.{1,2}[/\\]|\\|[A-Za-z]:[/\\])")
"""How a path begins that cannot be a name on the Hub."""

Facts = tuple[tuple[str, str], ...]
"""Pairs of a label and a text, in the order of reading."""


class Measured(Protocol):
    """A number with its 95 % interval, over so many prompts."""

    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102


def percent(value: float | None) -> str:
    """Write a share in percent: one decimal, three below 0.05 %, a dash where it is missing or no number.

    Args:
        value: a share, 1 being the whole.

    Example:
        >>> percent(0.1671), percent(0.0002), percent(3e-7), percent(-0.0), percent(None)
        ('16.7 %', '0.020 %', '< 0.001 %', '0.0 %', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size == 0 or size >= 0.0005:
        # Adding 0 makes 0 of -0, which a difference turned round leaves.
        return f"{100 * value + 0.0:.1f} %"
    # Below, one decimal would round a value that is there to 0.0 %.
    return f"{100 * value:.3f} %" if size >= 0.000005 else f"{'< ' if value > 0 else '> -'}0.001 %"


def nats(value: float | None) -> str:
    """Write a safety KL in two digits, with a power of ten where it is small.

    Example:
        >>> nats(0.42595), nats(9.5e-05), nats(None)
        ('0.43', '9.5e-05', '–')
    """
    return DASH if value is None or not math.isfinite(value) else f"{value:.2g}"


def interval(share: Measured) -> str:
    """Write the bounds of a share's 95 % interval in percent.

    Example:
        >>> from deltaguard.reports.records.base import RateRow
        >>> interval(RateRow(successes=1, total=4, value=0.25, low=0.046, high=0.699))
        '4.6–69.9 %'
        >>> interval(RateRow(successes=1, total=4, value=0.25, low=-0.02, high=0.04))
        '-2.0 to 4.0 %'
    """
    # 0.0 turns -0.0 into 0.0
    low, high = (round(100 * end, 1) + 0.0 for end in (share.low, share.high))
    return f"{low:.1f}{' to ' if low < 0 else '–'}{high:.1f} %"


def duration(seconds: float) -> str:
    """Write a time in the units that suit its length.

    Example:
        >>> duration(0.42), duration(75), duration(7260)
        ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def size(count: int) -> str:
    """Bytes in decimal units.

    Example:
        >>> size(540_000_000), size(1_500_000_000), size(900)
        ('540 MB', '1.5 GB', '900 bytes')
    """
    for unit, factor, decimals in (("GB", 10**9, 1), ("MB", 10**6, 0), ("kB", 10**3, 0)):
        if count >= factor:
            return f"{count / factor:.{decimals}f} {unit}"
    return f"{count} bytes"


def points(value: float | None) -> str:
    """Write a difference in percentage points, always signed.

    Example:
        >>> points(1.25), points(-0.04), points(None)
        ('+1.2', '0.0', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"


def number(value: float | None) -> str:
    """Write a number that is no share with three significant digits.

    Example:
        >>> number(2.0417), number(2), number(0.00012), number(99.97), number(1234.5), number(None)
        ('2.04', '2.00', '0.000120', '100', '1234', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def capital(text: str) -> str:
    """Make the first letter of a text capital, and leave the others as they are.

    Example:
        >>> capital("harmful prompts in Spanish")
        'Harmful prompts in Spanish'
    """
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """Escape a user's text for Markdown, so that nothing in it is read as markup.

    Example:
        >>> plain("a|b <i>"), plain("![x](https://example.org)")
        ('a¦b ‹i>', '!(x)(https://example.org)')
    """
    others = str.maketrans({"|": "¦", "`": "'", "<": "‹", "[": "(", "]": ")"})
    return " ".join(text.translate(others).split())


def code(text: str) -> str:
    """Text as Markdown code, so that nothing in a name is read as markup, in a table as elsewhere.

    Example:
        >>> code("q_proj"), code("a`b|c")
        ('`q_proj`', '`` a`b¦c ``')
    """
    text = " ".join(text.split()).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def option(value: str | float | bool | None) -> str:
    """Write a choice of the user exactly as it was run.

    Example:
        >>> option(0.1), option(True), option(None), option("joint")
        ('0.1', 'yes', '–', 'joint')
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def public_option(value: str | float | bool | None) -> str:
    """Write a choice without the folders above a file or model that it names, for others to read.

    Example:
        >>> public_option("/home/me/base"), public_option("kind guard, model /home/me/guard")
        ('base', 'kind guard, model guard')
        >>> public_option("runs/mine/base"), public_option("Qwen/Qwen3-0.6B"), public_option(0.1)
        ('base', 'Qwen/Qwen3-0.6B', '0.1')
    """
    if not isinstance(value, str):
        return option(value)
    if PLACE.match(value):
        return short_reference(value)
    return _NAMED.sub(lambda found: short_reference(found[0]), without_folders(value))


def model_label(name: str) -> str:
    """Name one of the three models in running text.

    Example:
        >>> model_label("finetuned"), model_label("restored")
        ('fine-tuned', 'restored')
    """
    return "fine-tuned" if name == "finetuned" else name


def moment(created: str) -> str:
    """Write a time stamp in words, UTC.

    Args:
        created: ISO 8601, with an offset.

    Raises:
        ValueError: it is not ISO 8601.

    Example:
        >>> moment("2025-06-01T14:05:00+02:00")
        '1 June 2025, 12:05 UTC'
    """
    when = datetime.fromisoformat(created).astimezone(UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def hub_id(reference: str) -> str | None:
    """Find the Hub repository that a reference names, None where it names a folder.

    Only `owner/name` counts, with or without `@revision`. A folder that exists comes before the Hub, as it
    does where models are opened.

    Example:
        >>> hub_id("Qwen/Qwen3-0.6B@main"), hub_id("/data/my-finetune"), hub_id("./out")
        ('Qwen/Qwen3-0.6B', None, None)
    """
    match = _HUB_ID.fullmatch(reference)
    return match["id"] if match and not Path(reference).exists() else None


def short_reference(reference: str) -> str:
    """Cut a model's name to its last part: the folders above it are the user's own affair.

    Example:
        >>> short_reference("/home/me/runs/my-finetune/"), short_reference("Qwen/Qwen3-0.6B@main")
        ('my-finetune', 'Qwen/Qwen3-0.6B@main')
    """
    if hub_id(reference):
        return reference
    return re.split(r"[/\\]", reference.rstrip("/\\"))[-1] or reference


def short_command(command: str) -> str:
    """Cut the paths of a command to their last part, which is all that others need of them.

    Args:
        command: as typed into a shell, with whatever quotes it took.

    Example:
        >>> short_command("deltaguard bench '/home/me/my model' -o=/tmp/out --aligned Qwen/Qwen3-0.6B")
        "deltaguard bench 'my model' -o=out --aligned Qwen/Qwen3-0.6B"
    """

    def short(match: re.Match[str]) -> str:
        bare = match[0].replace("'", "").replace('"', "")
        if PLACE.match(bare):
            return shlex.quote(short_reference(bare))
        name, equals, value = bare.partition("=")
        cut = equals and PLACE.match(value)
        return shlex.quote(f"{name}={short_reference(value)}") if cut else match[0]

    return _WORD.sub(short, command)


def without_folders(text: str) -> str:
    """Cut each absolute path in a sentence to its last name.

    A path with a space in it is cut up to there alone.

    Example:
        >>> without_folders("There is no file /home/me/set.csv (see https://example.org/set).")
        'There is no file set.csv (see https://example.org/set).'
    """
    return _PATH.sub(r"\1", text)


def counted(count: int, what: str) -> str:
    """Count things in words, in the plural unless it is one.

    Example:
        >>> counted(1, "layer"), counted(8, "layer")
        ('1 layer', '8 layers')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def times(seconds: Mapping[str, float]) -> str:
    """Wall times in one line, the total before its parts.

    Example:
        >>> times({"solve": 8.0, "total": 75.0, "read": 2.25})
        '1 min 15 s (solve 8.0 s, read 2.2 s)'
    """
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")
    if "total" not in seconds:
        return parts
    return f"{duration(seconds['total'])} ({parts})" if parts else duration(seconds["total"])


def option_facts(options: Mapping[str, str | float | bool | None]) -> Facts:
    """List every choice of a run under the name it has as an option.

    Example:
        >>> option_facts({"method": "greedy", "other_params": "aligned"})
        (('method', 'greedy'), ('other params', 'aligned'))
    """
    return tuple((name.replace("_", " "), option(value)) for name, value in options.items())


def environment_facts(environment: Environment) -> Facts:
    """When and on what the numbers were made."""
    return (
        ("date", moment(environment.created)),
        ("machine", environment.machine),
        ("device", environment.device),
        ("versions", ", ".join(f"{name} {release}" for name, release in environment.versions.items())),
    )


def model_facts(aligned: ModelReference, finetuned: ModelReference) -> Facts:
    """Name the two models of a restore or a sweep with the fingerprints of their weights."""
    return tuple(
        (label, f"{short_reference(model.reference)}, fingerprint {model.fingerprint}")
        for label, model in (("fine-tuned model", finetuned), ("aligned model", aligned))
    )
