"""A bench as people read it: the plot, the terminal and Markdown tables."""

import re
from xml.etree import ElementTree as ET

import pytest

from bench_reports import ATTACK, FINETUNES, METHODS, STRENGTHS, bench_report, without_share
from deltaguard.errors import DeltaguardError
from deltaguard.reports.bench import (
    NOT_SAFE,
    bench_markdown,
    bench_page,
    bench_table,
    contest_legend,
    contests_table,
    legend,
    preparation,
    preparation_line,
    scores_table,
)
from deltaguard.reports.curves import (
    band_rows,
    bench_svg,
    cut,
    label_rows,
    panel_svg,
    point_rows,
    swatch_svg,
    utility_domain,
)
from deltaguard.reports.palette import DARK, LIGHT, colour, dash, palette_css, shape
from deltaguard.reports.records.bench import BenchReport
from deltaguard.reports.text import short_command
from drawing import at_80_columns

SVG = "{http://www.w3.org/2000/svg}"


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
    assert {f"{strength:g}" for strength in STRENGTHS} <= set(texts)
    assert texts.count("log-likelihood, general, over aligned") == 1


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


def test_where_there_is_no_gain_the_height_is_what_a_point_costs_in_general():
    report = bench_report()
    row = next(row for row in FINETUNES if not row.gains)
    curve = [point for point in report.curves if point.finetune == row.name]
    assert [(r["y_low"], r["y"], r["y_high"]) for r in point_rows(report, row)] == [
        (-point.general.high, -point.general.value, -point.general.low) for point in curve
    ]


def test_a_label_covers_no_point_no_other_label_and_is_left_out_where_there_is_no_room():
    one, other = (100.0, 100.0), (120.0, 108.0)
    (beside,) = label_rows([one], [(*one, "0.5")])
    assert (beside["left"], beside["middle"]) == (107.0, 109.0)
    (elsewhere,) = label_rows([one, other], [(*one, "0.5")])
    assert elsewhere["middle"] < one[1]
    (off_the_line,) = label_rows([one], [(*one, "0.5")], [(110.0, 109.0)])
    assert off_the_line["middle"] < one[1]
    first, second = label_rows([one], [(*one, "0.5"), (*one, "0.7")])
    assert (first["left"], first["middle"]) != (second["left"], second["middle"])
    crowd = [(x, y) for x in range(60, 150, 8) for y in range(60, 150, 8)]
    assert label_rows(crowd, [(*one, "0.5")]) == []


def test_up_is_better_and_larger_in_every_panel():
    """Where nothing is gained, the height is what happened to the likelihood of general answers."""
    texts = [e.text for e in parsed(panel_svg(bench_report(), FINETUNES[1])).iter(f"{SVG}text")]
    places = {
        e.text: float(re.search(r",(\S+?)\)", e.get("transform")).group(1))
        for e in parsed(panel_svg(bench_report(), FINETUNES[1])).iter(f"{SVG}text")
        if re.fullmatch(r"−?\d\.\d+|0", e.text or "") and e.get("text-anchor") == "end"
    }
    values = {float(text.replace("−", "-")): place for text, place in places.items()}
    assert len(values) > 2
    assert sorted(values) == sorted(values, key=values.get, reverse=True)
    assert "rise" not in " ".join(filter(None, texts))


def test_a_swatch_is_one_line_and_one_point():
    svg = swatch_svg(3)
    assert len(symbols(svg)) == 1
    assert "var(--c3, " in svg


def test_the_terminal_table_fits_80_columns_with_whole_numbers():
    report = bench_report()
    text = at_80_columns(bench_table(report))
    assert all(len(line) <= 80 and "…" not in line for line in text.splitlines())
    compared = sum(contest.other == "safe-instruct" for contest in report.contests)
    assert len(re.findall(r"^ safe-instruct ", text, re.MULTILINE)) == len(FINETUNES) + compared
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(" greedy "))
    assert lines[place].split() == ["greedy", "0.2", "-0.1", "+2.2", "63.5", "%"]
    assert re.search(r"3\.5 s +yes +-1\.6 to \+1\.4 +-0\.3 to \+4\.7 +58\.5–68\.5 %", lines[place + 1])
    said = " ".join(text.split())
    assert "attack success 10.0 % aligned, 80.0 % fine-tuned" in said
    assert "false refusals 5.0 % aligned, 2.0 % fine-tuned" in said
    assert said.endswith("Once per aligned model: store 44.0 s, safe 1 min 0 s.")
    assert legend(report) in said


def test_markdown_has_a_row_a_method_and_says_what_is_not_safe():
    report = bench_report()
    table = scores_table(report, FINETUNES[0]).markdown().splitlines()
    assert len(table) == 2 + len(METHODS)
    assert {line.count("|") for line in table} == {8}
    numbers = "-0.1 (-1.6 to +1.4) | +2.2 (-0.3 to +4.7) | 63.5 % (58.5–68.5 %)"
    assert table[2] == f"| `greedy` | 0.2 | {numbers} | yes | 3.5 s |"
    assert table[-1] == f"| `backdoor` | {NOT_SAFE} | – | – | – | yes | 3.5 s |"
    whole = bench_markdown(report)
    assert [line for line in whole.splitlines() if line.startswith("###")] == [
        f"### {row.title}" for row in FINETUNES
    ]
    assert report.methods == METHODS


def test_markdown_reads_no_name_as_markup():
    table = scores_table(bench_report(methods=(f"a|b`{ATTACK}",)), FINETUNES[0]).markdown()
    assert f"| `` a¦b`{ATTACK} `` |" in table


def test_where_none_is_safe_the_table_says_whether_that_may_be_chance_and_claims_nothing_unmeasured():
    report = bench_report()
    finetune = FINETUNES[2]
    for row, told_apart in ((FINETUNES[0], "yes"), (finetune, "no")):
        shown = [each.text for each in scores_table(report, row).rows[-1].cells]
        assert (shown[0], shown[1], shown[5]) == ("backdoor", NOT_SAFE, told_apart)
    rest = tuple(point for point in report.curves if point.method != "backdoor")
    unmeasured = scores_table(report.model_copy(update={"curves": rest}), finetune).rows[-1].cells
    assert [each.text for each in unmeasured[:6]] == ["backdoor", *"–––––"]


def test_under_each_fine_tune_stands_what_keeps_most_beside_the_others():
    report = bench_report()
    told = report.contests_of(FINETUNES[0])
    assert len({contest.told_apart for contest in told}) == 2
    table = contests_table(report, FINETUNES[0])
    lines = table.markdown().splitlines()
    apart = [contest.other for contest in told if contest.told_apart]
    assert (
        f"{told[0].leader} keeps most at a safe strength: told apart from {', '.join(apart)};" in table.title
    )
    assert len(lines) == 2 + len(told)
    assert {line.count("|") for line in lines} == {6}
    contest, row = told[0], lines[2]
    kept = (
        f"{100 * contest.kept.value:+.1f} ({100 * contest.kept.low:+.1f} to {100 * contest.kept.high:+.1f})"
    )
    numbers = f"{kept} | +1.5 (-0.5 to +3.5) | -2.5 (-6.5 to +1.5)"
    assert row == f"| `{contest.other}` | {numbers} | {'yes' if contest.told_apart else 'no'} |"
    whole, said = bench_markdown(report), " ".join(at_80_columns(bench_table(report)).split())
    assert whole.count(" keeps most at a safe strength") == len(FINETUNES) - 1
    for text in (whole, said):
        assert contest_legend(report) in text
    assert table.title in whole
    assert contests_table(report, FINETUNES[3]).title in said


def test_without_two_safe_methods_nothing_is_said_to_keep_most():
    report = bench_report(contests=())
    assert contests_table(report, FINETUNES[0]) is None
    assert contest_legend(report) == ""
    assert "keeps most" not in bench_markdown(report)
    assert "keeps most" not in at_80_columns(bench_table(report))


def test_a_share_of_which_nothing_is_known_beyond_the_examples_has_no_interval():
    report = bench_report()
    score = report.scores[0]
    flat = score.model_copy(update={"kept": score.kept.model_copy(update={"low": 0.5, "high": 0.5})})
    changed = report.model_copy(update={"scores": (flat, *report.scores[1:])})
    assert scores_table(changed, FINETUNES[0]).rows[0].cells[4].interval == ""


def test_the_page_shows_every_number_with_its_interval():
    report = bench_report()
    page = bench_page(report)
    cell = next(cell for cell in report.cells if cell.strength == 0.6)
    mean = f'<td data-value="{cell.mean_utility.value}">2.03<small>2.00 to 2.06</small></td>'
    _, measured = page.split("Every model measured", 1)
    assert mean in measured
    rows = measured.split("<tbody>")[1].split("</tbody>")[0]
    assert rows.count("<small>") == 5 * len(report.cells)
    point = report.curves[-1].general
    assert f"{point.value:.3f}<small>{point.low:.3f} to {point.high:.3f}</small>" in page
    assert contests_table(report, FINETUNES[0]).title in page
    assert contest_legend(report) in page


def test_preparation_counts_neither_fine_tunes_nor_requests_nor_measuring():
    report = bench_report()
    assert preparation(report) == {"store": 44.0, "safe": 60.0}
    assert preparation_line(report.model_copy(update={"seconds": {"total": 1.0}})) == ""


def test_a_band_goes_along_the_lower_ends_and_back_along_the_upper():
    rows = point_rows(bench_report(), FINETUNES[0])
    corners = [corner for corner in band_rows(rows) if corner["method"] == "greedy"]
    curve = [row for row in rows if row["method"] == "greedy"]
    assert [corner["place"] for corner in corners] == list(range(2 * len(STRENGTHS)))
    lower, upper = corners[: len(curve)], corners[len(curve) :]
    assert [(c["x"], c["y"]) for c in lower] == [(row["x"], row["y_low"]) for row in curve]
    assert [(c["x"], c["y"]) for c in upper[::-1]] == [(row["x"], row["y_high"]) for row in curve]
    assert [corner["x"] for corner in band_rows(rows[::-1])][:3] == [row["x"] for row in rows[-3:]]


def test_every_curve_with_intervals_has_a_band_and_a_point_alone_a_bar():
    def filled(svg):
        groups = [g for g in parsed(svg).iter(f"{SVG}g") if "mark-line" in g.get("class", "")]
        return sum(path.get("fill-opacity") is not None for g in groups for path in g)

    def uprights(svg):
        lines = [line for line in parsed(svg).iter(f"{SVG}line") if line.get("opacity") == "0.5"]
        return sum(line.get("x2") == "0" and line.get("y2") != "0" for line in lines)

    report = bench_report()
    whole, harmful = panel_svg(report, FINETUNES[0]), panel_svg(report, FINETUNES[1])
    assert (filled(whole), uprights(whole)) == (len(METHODS), 0)
    assert (filled(harmful), uprights(harmful)) == (len(METHODS), 0)
    first = report.model_copy(
        update={"curves": tuple(p for p in report.curves if p.strength == STRENGTHS[0])}
    )
    alone = panel_svg(first, FINETUNES[0])
    assert (filled(alone), uprights(alone)) == (0, len(METHODS))


def test_intervals_end_where_the_panel_does():
    rows = point_rows(bench_report(), FINETUNES[0])
    domain = utility_domain(rows, gains=True)
    assert all(domain[0] < row["y"] < domain[1] for row in rows)
    far = cut(rows[0] | {"y_low": -9.0, "y_high": 9.0}, domain)
    assert (far["y_low"], far["y_high"]) == domain
    assert utility_domain([{"x": 0.0, "y": 0.0}], gains=False) == (-0.08, 0.08)


def test_the_standalone_plot_says_what_it_does_not_show():
    report = bench_report()
    assert "not drawn" not in bench_svg(report)
    some = bench_svg(without_share(report, "identity", {"greedy"}))
    assert f"{len(STRENGTHS)} of {len(METHODS) * len(STRENGTHS)} points" in " ".join(
        re.sub("<[^>]+>", " ", some).split()
    )
    whole = bench_svg(without_share(report, "identity", set(METHODS)))
    assert "identity shift: not drawn" in whole


def test_a_long_title_is_broken_into_lines_of_its_panel():
    title = "benign task with a harmful part (1000 benign, 90 harmful; all weights)"
    row = FINETUNES[0].model_copy(update={"title": title})
    texts = [
        e.text for e in parsed(bench_svg(bench_report(finetunes=(row, *FINETUNES[1:])))).iter() if e.text
    ]
    assert title not in texts
    lines = ("benign task with a harmful part", "(1000 benign, 90 harmful; all", "weights)")
    assert " ".join(lines) == title
    assert all(texts.count(line) == 1 for line in lines)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("deltaguard bench -o out", "deltaguard bench -o out"),
        ("deltaguard bench Qwen/Qwen3-0.6B@main", "deltaguard bench Qwen/Qwen3-0.6B@main"),
        ("run /data/me/model -o ~/me/out", "run model -o out"),
        ("run '/data/my own/model one'", "run 'model one'"),
        ("run --out=/data/me/out --seed=1", "run --out=out --seed=1"),
        ("run ../me/model C:\\me\\model", "run model model"),
        ("Anna's run of https://host/v1", "Anna's run of https://host/v1"),
    ],
)
def test_a_command_is_told_without_folders(command, shown):
    assert short_command(command) == shown


def test_a_method_may_have_a_name_that_no_expression_of_a_chart_could_hold():
    content = bench_report().model_dump_json().replace('"greedy"', f'"{"é" * 100_000}"')
    report = BenchReport.model_validate_json(content)
    assert panel_svg(report, report.finetunes[0])
