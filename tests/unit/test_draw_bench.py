"""A bench as people read it: the plot, the terminal and Markdown tables."""

import io
import re
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from deltaguard.draw.bench_chart import bench_svg, panel_svg, swatch_svg
from deltaguard.draw.bench_tables import NOT_SAFE, bench_markdown, bench_table, scores_markdown
from deltaguard.draw.bench_view import bench_methods, general_change
from deltaguard.draw.palette import DARK, LIGHT, colour, dash, palette_css, shape
from deltaguard.errors import DeltaguardError
from reports import ATTACK, FINETUNES, METHODS, STRENGTHS, bench_report

SVG = "{http://www.w3.org/2000/svg}"


def at_80_columns(table):
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def parsed(svg):
    return ET.fromstring(svg)  # noqa: S314 - drawn here


def symbols(svg):
    """The points of a plot, without those of its legend."""
    groups = [g for g in parsed(svg).iter(f"{SVG}g") if "mark-symbol" in g.get("class", "")]
    return [path for g in groups if "legend" not in g.get("class") for path in g]


def test_methods_are_told_apart_by_colour_shape_and_dashes():
    looks = [(colour(i), shape(i), tuple(dash(i))) for i in range(len(LIGHT) * 7 * 3)]
    assert len(set(looks)) == len(looks)
    assert len(set(LIGHT)) == len(set(DARK)) == len(LIGHT) == len(DARK)
    assert len({(shape(i), tuple(dash(i))) for i in range(10)}) == 10
    assert palette_css("svg").count("--c9") == 2


def test_the_plot_has_a_panel_a_finetune_and_a_point_a_strength():
    report = bench_report()
    svg = bench_svg(report)
    assert len(symbols(svg)) == len(FINETUNES) * len(METHODS) * len(STRENGTHS)
    texts = [element.text for element in parsed(svg).iter(f"{SVG}text")]
    assert all(texts.count(row.title) == 1 for row in FINETUNES)
    assert all(texts.count(method) == 1 for method in METHODS)
    assert texts.count("bound 2") == len(FINETUNES)
    assert texts.count("rise of NLL on everyday requests") == 1


def test_a_point_further_right_is_drawn_further_right():
    report = bench_report(methods=METHODS[:1])
    drawn = symbols(panel_svg(report, FINETUNES[0]))
    places = [
        tuple(map(float, re.search(r"translate\((\S+?),(\S+?)\)", path.get("transform")).groups()))
        for path in drawn
    ]
    curve = [point for point in report.curves if point.finetune == FINETUNES[0].name]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [point.points.value for point in curve] == sorted(point.points.value for point in curve)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert [point.kept.value for point in curve] == sorted(point.kept.value for point in curve)


def test_the_standalone_plot_brings_its_ground_and_refers_to_nothing():
    svg = bench_svg(bench_report())
    assert "prefers-color-scheme: dark" in svg
    assert "--ground" in svg
    assert not re.search(r"url\(|@import|<script|<image", svg)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]+", svg)) <= namespaces


def test_names_are_escaped_in_the_plot():
    svg = bench_svg(bench_report(methods=(ATTACK, "other")))
    assert ATTACK not in svg
    assert not [e for e in parsed(svg).iter() if e.tag.endswith("script")]


def test_a_panel_without_curves_is_not_drawn():
    report = bench_report()
    rest = tuple(point for point in report.curves if point.finetune != "clean")
    partial = report.model_copy(update={"curves": rest})
    assert panel_svg(partial, FINETUNES[3]) is None
    assert "clean tickets</text>" not in bench_svg(partial)
    with pytest.raises(DeltaguardError, match="0 points of curves"):
        bench_svg(report.model_copy(update={"curves": ()}))


def test_the_change_in_general_is_the_mean_over_seeds():
    report = bench_report()
    point = next(p for p in report.curves if (p.finetune, p.method, p.strength) == ("harmful", "resta", 0.6))
    assert general_change(report, point) == pytest.approx(0.6 * 5 / 20)
    aligned = tuple(cell for cell in report.cells if cell.method != "aligned")
    assert general_change(report.model_copy(update={"cells": aligned}), point) is None


def test_a_swatch_is_one_line_and_one_point():
    svg = swatch_svg(3)
    assert len(symbols(svg)) == 1
    assert "var(--c3, " in svg


def test_the_terminal_table_fits_80_columns_with_whole_numbers():
    report = bench_report()
    text = at_80_columns(bench_table(report))
    assert all(len(line) <= 80 and "…" not in line for line in text.splitlines())
    assert len(re.findall(r"^ safe-instruct ", text, re.MULTILINE)) == len(FINETUNES)
    row = next(line for line in text.splitlines() if line.startswith(" greedy "))
    assert re.search(r"greedy +0\.2 +-0\.1 +63\.5 % +yes +3\.5 s", row)
    assert "-1.6 to +1.4   58.5 to 68.5 %" in text
    assert "attack success 10.0 % aligned, 80.0 % fine-tuned" in " ".join(text.split())


def test_markdown_has_a_row_a_method_and_says_what_is_not_safe():
    report = bench_report()
    table = scores_markdown(report, FINETUNES[0]).splitlines()
    assert len(table) == 2 + len(METHODS)
    assert {line.count("|") for line in table} == {7}
    assert table[2] == "| `greedy` | 0.2 | -0.1 (-1.6 to +1.4) | 63.5 % (58.5 to 68.5 %) | yes | 3.5 s |"
    assert table[-1] == f"| `backdoor` | {NOT_SAFE} | – | – | – | 3.5 s |"
    whole = bench_markdown(report)
    assert [line for line in whole.splitlines() if line.startswith("###")] == [
        f"### {row.title}" for row in FINETUNES
    ]
    assert bench_methods(report) == METHODS


def test_markdown_reads_no_name_as_markup():
    table = scores_markdown(bench_report(methods=(f"a|b`{ATTACK}",)), FINETUNES[0])
    assert "a¦b'‹script>alert(1)‹/script>" in table
