"""An evaluation's page, card and table are fit to be shown: no folder of the machine is in them."""

import io

import pytest
from rich.console import Console

from deltaguard.reports.evaluation import evaluation_card, evaluation_table
from deltaguard.reports.evaluation_page import evaluation_page, shown_settings
from deltaguard.reports.text import without_folders
from reports import evaluation_report


def table(report):
    console = Console(width=200, file=io.StringIO())
    console.print(evaluation_table(report))
    return console.file.getvalue()


@pytest.mark.parametrize("drawn", [evaluation_page, evaluation_card, table])
def test_names_are_shown_without_the_folders_above_them(drawn):
    report = evaluation_report()
    assert "/home/someone" in " ".join(report.notes)
    text = drawn(report)
    assert "/home/" not in text
    assert "no file mine.csv." in text
    assert "https://example.org/sets/mine" in text


def test_the_page_shows_the_settings_by_names_alone():
    report = evaluation_report()
    assert "/home/someone" in str(report.settings)
    page = evaluation_page(report)
    for name in ("prompts.csv", "task.jsonl", "model: guard", "format.txt", "scores.jsonl"):
        assert name in page
    assert "my sets" not in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The file ~/data/x.csv is gone.", "The file x.csv is gone."),
        ("`../up/x.csv`, '/a/b/c', --x=/a/b", "`x.csv`, 'c', --x=b"),
        ("org/set, and/or 1/2 of https://a.b/c/d", "org/set, and/or 1/2 of https://a.b/c/d"),
    ],
)
def test_what_is_no_path_stays(text, shown):
    assert without_folders(text) == shown


def test_settings_that_name_no_file_stay():
    settings = {"name": "/s", "sections": [{"name": "a", "builtin": "attack", "count": 3, "path": None}]}
    assert shown_settings(settings) == settings
