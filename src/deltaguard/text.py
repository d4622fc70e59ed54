"""Text from outside, as it can be shown and written."""

import re
import unicodedata

_WORD = re.compile(r"\w+")
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Persian is written with one of them and emoji with the other.
_JOINERS = "\u200c\u200d"


def words_of(text: str) -> str:
    """Reduce a text to its words, so that case, spacing and punctuation make no other prompt of it.

    Example:
        >>> words_of("How  do I bake a CAKE?")
        'how do i bake a cake'
    """
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text


def printable(line: str) -> str:
    r"""Show in a line what a terminal or browser would obey, and what no encoding can hold, as text.

    These are control characters, line breaks included, marks that turn the direction of writing, and lone
    surrogates, which stand for bytes of a file name that are not UTF-8.

    Example:
        >>> print(printable("weights\x1b[2J.safetensors"))
        weights\x1b[2J.safetensors
    """
    if line.isprintable():
        return line
    return "".join(char.encode("unicode_escape").decode() if _is_obeyed(char) else char for char in line)


def _is_obeyed(char: str) -> bool:
    if char in _JOINERS:
        return False
    # The last two of each plane, and 32 more, are no characters at all: no document may hold them.
    code = ord(char)
    no_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return no_character or unicodedata.category(char) in _OBEYED


def printable_lines(text: str) -> str:
    r"""Do to every line of a text what `printable` does to one; line breaks and tabs stay.

    Example:
        >>> print(printable_lines("one\ntwo\x07"))
        one
        two\x07
    """
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def shortened(text: str, most: int) -> str:
    """Cut a text off, saying so.

    Example:
        >>> shortened("a" * 100, 10)
        'aaaaaaaaa…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def writable(text: str) -> str:
    r"""Write out what UTF-8 cannot hold, such as bytes of a file name that are none.

    Example:
        >>> print(writable("model-\udcff"))
        model-\udcff
    """
    return text.encode(errors="backslashreplace").decode()
