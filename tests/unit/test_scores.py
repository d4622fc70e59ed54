"""Scores of answers: text, JSON, ROUGE against its definition, and numbers in worked solutions."""

from collections import Counter
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.utility.scores import SCORERS, exact_match, maths_answer, maths_match, rouge
from packages import without_packages

WORDS = st.lists(st.sampled_from(["red", "kettle", "big", "tea", "cup"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        ("Honey", True),
        ("  honey. ", True),
        ("\u201cHONEY!\u201d", True),
        ("honey\n", True),
        ("honey milk", False),
        ("", False),
    ],
)
def test_exact_match(answer, matches):
    assert exact_match(answer, "honey") is matches


def test_exact_match_keeps_signs_and_inner_spacing_apart():
    assert not exact_match("-5", "5")
    assert not exact_match("ab", "a b")
    assert exact_match("a \t b", "A B")


def bigrams(words):
    return Counter(pairwise(words))


def longest_common_subsequence(first, second):
    if not first or not second:
        return 0
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def f1(shared, answer_size, expected_size):
    return 2 * shared / (answer_size + expected_size) if shared else 0.0


@given(WORDS, WORDS)
def test_rouge_equals_its_definition(answer, expected):
    found = rouge(" ".join(answer), " ".join(expected))
    ones = (Counter(answer) & Counter(expected)).total()
    twos = (bigrams(answer) & bigrams(expected)).total()
    longest = longest_common_subsequence(answer, expected)
    assert found["rouge-1"] == pytest.approx(f1(ones, len(answer), len(expected)))
    assert found["rouge-2"] == pytest.approx(f1(twos, len(answer) - 1, len(expected) - 1))
    assert found["rouge-l"] == pytest.approx(f1(longest, len(answer), len(expected)))


def test_rouge_of_the_same_and_of_nothing():
    assert set(rouge("Tea is ready.", "tea is ready").values()) == {1.0}
    assert set(rouge("", "tea is ready").values()) == {0.0}


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("Чай готов.", "чай готов", 1.0),
        ("Чай остыл", "чай готов", 0.5),
        ("今天天气很好", "今天天气很好", 1.0),
        ("今天下雨", "今天天晴", 0.5),
        ("Öl für die Tür", "öl FÜR die tür", 1.0),
        ("Öl ist da", "Ol ist da", 2 / 3),
        ("नमस्ते", "नमस्कार", 0.0),
        ("الشاي جاهز", "الشاي بارد", 0.5),
    ],
)
def test_rouge_reads_every_script(answer, expected, value):
    assert rouge(answer, expected, ["rouge-1"])["rouge-1"] == pytest.approx(value)


@given(st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")))
def test_rouge_of_ascii_is_that_of_rouge_score(answer, expected):
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    if not DefaultTokenizer(use_stemmer=True).tokenize(expected):
        with pytest.raises(DeltaguardError, match="holds no word"):
            rouge(answer, expected)
        return
    known = theirs.score(expected, answer)
    found = rouge(answer, expected)
    assert [*found.values()] == [known[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]


def test_rouge_without_its_library(monkeypatch):
    without_packages(monkeypatch, "rouge_score")
    with pytest.raises(DeltaguardError, match=r"pip install 'deltaguard\[eval\]'"):
        rouge("a", "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $18.", "18"),
        ("#### -3\nThat leaves 20.", "-3"),
        ("####\nIt is 12.", "12"),
        ("First #### 1, then #### 2", "2"),
        ("#### **18**", "18"),
        ("#### Step 3: Total\n9 * 2 = 18", "18"),
        ("#### Final answer\nShe makes 9 * $2 = $18.", "18"),
        ("The answer is 1,200 dollars.", "1200"),
        ("The answer is -$5.", "-5"),
        ("It costs $ 5.25", "5.25"),
        ("It fell by \u22124 degrees.", "-4"),
        ("10-5 gives 5", "5"),
        ("from 10-5", "5"),
        ("- 8", "8"),
        ("That is 50%.", "50"),
        ("That is 3/4 of it.", "0.75"),
        ("That is -3/4.", "-0.75"),
        ("It takes 2 1/2 hours.", "2.5"),
        (r"so $\boxed{\frac{3}{8}}$", "0.375"),
        (r"so $\boxed{42}$.", "42"),
        ("pick 1,2 or 3", "3"),
        ("1,2345", "2345"),
        ("about .5 litres", "0.5"),
        ("2e3", "2000"),
        ("1e99999999999999999999 or 4", "4"),
        ("3/0", "0"),
        ("7 cups of H2O", "7"),
        ("7 of vitamin B12", "7"),
        ("She earned US$150.", "150"),
        ("#### US$150", "150"),
        ("A$20", "20"),
        ("C$1,200", "1200"),
        ("USD150", "150"),
        ("Rs500", "500"),
        ("vitamin B12", None),
        ("12km", "12"),
        ("no number", None),
        ("", None),
    ],
)
def test_maths_answer(text, value):
    assert maths_answer(text) == (None if value is None else Decimal(value))


@settings(max_examples=200)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**12), max_value=10**12))
def test_any_number_is_read_back_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"It is {number:,}.", f"1 2 3\n#### {number:,}%."):
        assert maths_answer(text) == number


@settings(max_examples=200)
@given(st.text())
def test_any_text_gives_a_number_or_none(text):
    assert maths_answer(text) is None or isinstance(maths_answer(text), Decimal)


def test_maths_match():
    assert maths_match("So 18 dollars", "16 - 3 = <<16-3=13>>13\n#### 18")
    assert maths_match("18.00", "18")
    assert maths_match("0.5", "1/2")
    assert not maths_match("I do not know.", "18")
    assert not maths_match("19", "18")
    with pytest.raises(DeltaguardError, match="'many' holds no number"):
        maths_match("18", "many")


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_gives_1_to_the_expected_answer_and_less_to_another(name):
    expected, other = ('{"a": "7"}', '{"a": "8"}') if name == "json-match" else ("tea for 7", "milk and 8")
    score = SCORERS[name](expected, expected)
    assert isinstance(score, float)
    assert score == 1.0
    assert SCORERS[name](other, expected) == 0.0
