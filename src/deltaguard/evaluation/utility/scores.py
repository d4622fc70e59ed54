"""Whether an answer is right, or how close it comes: text, JSON, summaries, numbers."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal

from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.finetuning import tasks

Scorer = Callable[[str, str], float]
Rouge = Literal["rouge-1", "rouge-2", "rouge-l"]

_ROUGE_NAMES: Mapping[Rouge, str] = MappingProxyType(
    {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"
_SENTENCE_ENDS = ".,;:!?\u2026"

_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Characters of Chinese and Japanese, which are written without spaces."""

_CURRENCY = re.compile(r"(?:\b[A-Z]{1,3}(?=[$€£¥])|\b(?:USD|EUR|GBP|Rs)(?=\s?\d))?[$€£¥]?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}")
_NUMBER = re.compile(
    r"""
    (?<![A-Za-z])[A-Za-z]++\d[\d.,]*       # "H2O" and "B12" hold no number
    |
    (?P<sign>(?<![\w)])-)?                # "10-5" and "2024-05" hold no negative number, "- 5" is a list
    (?:(?P<whole>\d+)\ (?=\d+/\d))?       # 1 1/2
    (?P<top>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,2}(?!\d))?|\.\d+)
    (?:\s?/\s?(?P<bottom>0*[1-9]\d*))?
    """,
    re.VERBOSE,
)


def exact_match(answer: str, expected: str) -> bool:
    """Compare two texts but for case, spacing, quotes around them and a full stop at the end.

    Example:
        >>> exact_match(' "Honey" .', "honey")
        True
        >>> exact_match("honey and milk", "honey")
        False
    """
    return _normalised(answer) == _normalised(expected)


def _normalised(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(_QUOTES + _SENTENCE_ENDS + " ").lstrip(_QUOTES + " ")


def rouge(answer: str, expected: str, kinds: Sequence[Rouge] = tuple(_ROUGE_NAMES)) -> dict[Rouge, float]:
    """Compute ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), each the F1 of recall and precision.

    Words of ASCII letters are stemmed, as rouge-score does it; it drops all others, which here count as they
    stand, and each Chinese or Japanese character as a word. ROUGE-L takes the longest common subsequence of
    the whole texts, line breaks notwithstanding.

    Raises:
        DeltaguardError: rouge-score is not installed, or `expected` holds no word.

    Example:
        >>> rouge("the cat sat", "the cat ran")["rouge-2"]
        0.5
    """
    require_packages("ROUGE", "eval", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    words = _Words()
    if not words.tokenize(expected):
        raise DeltaguardError(
            f"The expected answer {expected!r} holds no word, so that no answer can be like it: correct the "
            "file."
        )
    scorer: Any = RougeScorer([_ROUGE_NAMES[kind] for kind in kinds], tokenizer=words)
    scores = scorer.score(expected, answer)
    return {kind: float(scores[_ROUGE_NAMES[kind]].fmeasure) for kind in kinds}


class _Words:
    """What RougeScorer takes for a tokenizer: words of any script."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii: Any = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """List the words of a text, in order."""
        plain = unicodedata.normalize("NFKC", text).casefold()
        # Vowel signs of many scripts are marks, no letters, and belong to the word.
        kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in plain)
        words = _UNSPACED.sub(r" \g<0> ", "".join(kept)).split()
        return [
            token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])
        ]


def maths_answer(answer: str) -> Decimal | None:
    r"""Find the number that a worked solution arrives at.

    It is the number right after the last `####`, which ends the solutions of GSM8K (Cobbe et al. 2021); where
    there is no such mark, or other words follow it, as in a heading, the last number of the text. Signs of
    currency and percent do not count: "50%" is 50. Fractions are divided out.

    Returns:
        The number, `None` where the text holds none.

    Example:
        >>> maths_answer("She has 3 * $400 left.\n#### 1,200.")
        Decimal('1200')
        >>> maths_answer("So it takes her 1 1/2 hours.")
        Decimal('1.5')
    """
    text = _CURRENCY.sub("", _LATEX_FRACTION.sub(r"\1/\2", answer)).replace("\u2212", "-")
    _, mark, rest = text.rpartition("####")
    if mark and (marked := _NUMBER.match(rest.lstrip("* \t\n"))) is not None and marked["top"]:
        return _value(marked)
    found = [match for match in _NUMBER.finditer(text) if match["top"]]
    return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["top"].replace(",", ""))
    if match["bottom"]:
        value /= Decimal(match["bottom"])
    if match["whole"]:
        value += Decimal(match["whole"])
    return -value if match["sign"] else value


def maths_match(answer: str, expected: str) -> bool:
    r"""Tell whether an answer arrives at the number that the expected solution arrives at.

    Args:
        answer: what the model says; one without a number is wrong.
        expected: a solution or the number alone.

    Raises:
        DeltaguardError: `expected` holds no number.

    Example:
        >>> maths_match("That makes 42 apples.", "6 * 7 = 42\n#### 42")
        True
    """
    right = maths_answer(expected)
    if right is None:
        raise DeltaguardError(
            f"The expected answer {expected!r} holds no number, so that no answer can be right: score this "
            "set with `exact-match`, or correct the file."
        )
    return maths_answer(answer) == right


def _share(matches: Callable[[str, str], bool]) -> Scorer:
    return lambda answer, expected: float(matches(answer, expected))


def _one_rouge(kind: Rouge) -> Scorer:
    return lambda answer, expected: rouge(answer, expected, (kind,))[kind]


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "exact-match": _share(exact_match),
        "json-match": _share(tasks.exact_match),
        "maths": _share(maths_match),
        **{kind: _one_rouge(kind) for kind in _ROUGE_NAMES},
    }
)
"""Scores from 0 to 1 of an answer (first argument) against the expected one, by the names suites use."""
