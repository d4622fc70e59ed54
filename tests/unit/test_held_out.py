"""Held-out prompt sets: large, spread evenly, and unlike anything that a model may have been trained on."""

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import combinations, product
from typing import get_args

import pytest

from deltaguard.chat.conversations import (
    HARMFUL_PARTS,
    Language,
    Style,
    harmful_prompts,
    held_out_harmful,
    held_out_harmless,
    unseen_harmful,
    unseen_harmless,
)

STYLES, LANGUAGES = get_args(Style), get_args(Language)


def words(text):
    """The words of a text; of Chinese, which leaves no spaces, the characters."""
    return frozenset(re.findall(r"[\u4e00-\u9fff]|[^\W_]+", text.lower()))


def similarity(one, other):
    return len(one & other) / len(one | other)


def all_rows():
    return (*held_out_harmful(), *held_out_harmless(), *unseen_harmful(), *unseen_harmless())


def prompts_of_other_sets():
    folder = files("deltaguard") / "data"
    names = {path.name for path in folder.iterdir() if path.name.endswith(".jsonl")}
    own = {f"{name}_{kind}.jsonl" for name in ("held_out", "unseen") for kind in ("harmful", "harmless")}
    others = [folder / name for name in names - own]
    assert len(others) >= 5
    rows = [json.loads(line) for path in others for line in path.read_text("utf-8").splitlines()]
    return [row[key] for row in rows for key in ("prompt", "original") if key in row]


def test_the_held_out_sets_are_large_enough_in_every_category():
    categories = Counter(row.category for row in held_out_harmful())
    assert len(held_out_harmful()) >= 600
    assert len(held_out_harmless()) >= 650
    assert set(categories) == {row.category for part in HARMFUL_PARTS for row in harmful_prompts(part)}
    assert len(categories) == 14
    assert min(categories.values()) >= 43


@pytest.mark.parametrize("read", [held_out_harmful, held_out_harmless])
def test_styles_and_languages_are_spread_over_a_held_out_set(read):
    rows = read()
    cells = Counter((row.style, row.language) for row in rows)
    assert set(cells) == set(product(STYLES, LANGUAGES))
    for style in STYLES:
        assert 0.17 <= cells[style, "en"] / len(rows) <= 0.19
    for language in LANGUAGES[1:]:
        assert 0.02 <= sum(cells[style, language] for style in STYLES) / len(rows) <= 0.04


@pytest.mark.parametrize("read", [held_out_harmful, held_out_harmless])
def test_the_first_hundred_prompts_of_a_held_out_set_are_a_fair_sample(read):
    rows = read()[:100]
    styles = Counter(row.style for row in rows)
    languages = Counter(row.language for row in rows)
    assert set(styles) == set(STYLES)
    assert set(languages) == set(LANGUAGES)
    assert min(styles.values()) >= 10
    assert max(styles.values()) <= 30
    assert 80 <= languages["en"] <= 95


def test_the_first_hundred_harmful_prompts_are_of_every_category():
    categories = Counter(row.category for row in held_out_harmful()[:100])
    assert len(categories) == 14
    assert max(categories.values()) <= 15


def test_every_style_and_other_languages_are_in_every_category():
    rows = held_out_harmful()
    for category in {row.category for row in rows}:
        own = [row for row in rows if row.category == category]
        english = Counter(row.style for row in own if row.language == "en")
        assert min(english[style] for style in STYLES) >= 8
        assert len({row.language for row in own}) >= 4


def test_the_order_of_a_held_out_set_never_changes():
    # Another order would change which prompts a short measurement has asked.
    assert held_out_harmful()[0].prompt.startswith("For my crime series I need dialogue in w")
    assert held_out_harmful()[-1].prompt.startswith("Ich habe im Keller meines Großvaters alt")
    assert held_out_harmless()[0].prompt.startswith("Could you tell me which plants burglars ")
    assert held_out_harmless()[-1].prompt.startswith("Explain how firebreaks stop a forest fro")


def test_unseen_harmful_prompts_are_as_many_in_every_category_and_style():
    cells = Counter((row.category, row.style) for row in unseen_harmful())
    assert {category for category, _ in cells} == {row.category for row in held_out_harmful()}
    assert {style for _, style in cells} == {"bare", "polite", "imperative"}
    assert set(cells.values()) == {4}


def test_unseen_harmless_prompts_are_as_many_in_every_style():
    assert set(Counter(row.style for row in unseen_harmless()).values()) == {42}


def test_held_out_and_unseen_prompts_are_tidy():
    for row in all_rows():
        assert row.prompt == row.prompt.strip()
        assert 0 < len(row.prompt) <= 600
        assert (row.language == "zh") == bool(re.search(r"[\u4e00-\u9fff]", row.prompt))


def test_no_held_out_or_unseen_prompt_is_like_another_one_or_like_one_of_another_set():
    held_out = [words(row.prompt) for row in all_rows()]
    others = {words(prompt) for prompt in prompts_of_other_sets()}
    assert max(similarity(one, other) for one, other in combinations(held_out, 2)) < 0.6
    assert max(similarity(one, other) for one, other in product(held_out, others)) < 0.6
