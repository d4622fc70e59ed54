"""An evaluation and a bench as pages: every number is there, nothing is claimed beyond the intervals."""

import re
from html import unescape

import pytest

from bench_reports import ATTACK, FINETUNES, METHODS, bench_report, without_share
from deltaguard.reports.bench import bench_page
from deltaguard.reports.charts import Mark, marks_chart
from deltaguard.reports.evaluation import (
    evaluation_card,
    finding_text,
    is_probe,
    measures_of,
    p_text,
    probe_tables,
)
from deltaguard.reports.evaluation_page import evaluation_page
from reports import COMPARISONS, JUDGES, MODELS, PROBES, SECTIONS, evaluation_report


@pytest.fixture(scope="module")
def page():
    return evaluation_page(evaluation_report())


@pytest.fixture(scope="module")
def bench():
    return bench_page(bench_report())


def cells(page, caption):
    """The rows of the table under a caption, as texts."""
    table = page.split(f"<caption>{caption}", 1)[1].split("</table>", 1)[0].split("<tbody>")[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    parts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(unescape(re.sub("<[^>]+>", " ", part)).split()) for part in row] for row in parts]


def test_each_section_has_its_charts_and_a_table_a_judge(page):
    assert [row[:2] for row in cells(page, "Judge opening")] == [
        ["aligned", "12.0 % 6.0–18.0 % (n = 150)"],
        ["fine-tuned", "86.0 % 80.0–92.0 % (n = 150)"],
        ["restored", "15.0 % 9.0–21.0 % (n = 150)"],
    ]
    assert page.count("<caption>Judge keywords") == 2
    assert page.count("<figure>") == 4
    assert "12.0 % aligned" in page


def test_a_model_that_was_fine_tuned_again_is_no_probe():
    plain = SECTIONS[0]
    named = [plain.model_copy(update={"name": f"{plain.name}/{way}"}) for way in ("second-attack", "gcg")]
    assert [is_probe(section) for section in (plain, *named)] == [False, False, True]


def test_probes_stand_beside_the_plain_prompts(page):
    table, other = probe_tables(evaluation_report())
    assert (table.note, other.note) == tuple(f"judge {judge}" for judge in JUDGES)
    assert [column.title for column in table.columns[1:]] == ["aligned", "fine-tuned", "restored"]
    probed = [f"harmful prompts, {probe}" for probe in PROBES]
    assert [row.cells[0].text for row in table.rows] == [SECTIONS[0].title, *probed]
    assert len(cells(page, "Attack success under probes")) == 1 + len(PROBES)
    assert probe_tables(evaluation_report().model_copy(update={"sections": SECTIONS[:1]})) == ()


def test_comparisons_say_what_the_interval_supports(page):
    rows = cells(page, "Comparisons")
    assert [row[-1] for row in rows] == [
        "higher than aligned",
        "not told apart from aligned",
        "lower than aligned",
        "higher than aligned",
    ]
    assert rows[1][3:5] == ["+3.0 -1.0 to +7.0", "0.21 mcnemar"]
    assert rows[3][3:5] == ["+0.2 +0.1 to +0.3 38 of 40 prompts", "< 0.001 paired bootstrap"]
    assert finding_text(COMPARISONS[1]) == "not told apart from aligned"
    assert not re.search(r"\b(signific\w+|better|worse|safer|much)\b", " ".join(map(" ".join, rows)))


def test_tasks_of_the_harness_are_told_with_what_they_compare_by(page):
    assert cells(page, "Tasks of lm-eval") == [
        ["aligned", "gsm8k", "3.0", "5", "applied", "500", "0.4.13"],
        ["fine-tuned", "gsm8k", "3.0", "5", "not applied", "500", "0.4.13"],
        ["restored", "gsm8k", "3.0", "differ", "applied", "500", "0.4.13"],
    ]
    card = evaluation_card(evaluation_report())
    assert "| restored | gsm8k | 3.0 | differ | applied | 500 | 0.4.13 |" in card
    assert ", over 38 of 40 prompts" in card
    bare = evaluation_report(harness=())
    assert "Tasks of lm-eval" not in evaluation_page(bare) + evaluation_card(bare)


def test_judges_are_compared_and_an_undefined_kappa_is_a_dash(page):
    assert cells(page, "Agreement of judges") == [
        ["opening, keywords", "harmful prompts", "0.83", "93.3 %", "150"],
        ["opening, keywords", "harmless prompts", "–", "100.0 %", "80"],
    ]


def test_answers_are_escaped_folded_and_told_by_every_judge(page):
    assert ATTACK not in page
    sample = page.split('<article class="card sample">')[1]
    folded = sample.split("<details>")[1]
    assert "harmful answer &lt;script&gt;" in folded
    assert "<code>opening</code> complied" in folded
    assert "<details>" not in page.split('<article class="card sample">')[2]


def test_the_page_tells_the_run(page):
    assert all(letter * 64 in page for letter in "abcd")
    assert all(fact in page for fact in ("temperature 0.0, seed 0", "chat template –", "torch 2.9.0"))
    assert "/home/someone" not in page
    assert "was skipped &lt;script&gt;" in page


def test_an_evaluation_without_judges_or_samples_still_is_a_page():
    lists = ("comparisons", "agreements", "samples", "notes", "measures", "sections")
    bare = evaluation_page(evaluation_report(**dict.fromkeys(lists, ()), files={}))
    for title in ("Probes", "Compared with", "Do the judges agree?", "Answers side by side"):
        assert title not in bare


def test_a_chart_draws_the_interval_of_every_estimate():
    found = measures_of(evaluation_report(), SECTIONS[-1])[::2]
    marks = [
        Mark(m.model, "", m.estimate.low, m.estimate.value, m.estimate.high, f"{m.estimate.value:.2f}")
        for m in found
    ]
    svg = marks_chart(marks, MODELS, shares=False)
    assert svg.count('aria-roledescription="rule mark container"') == 1
    assert [number in svg for number in (">1.90<", ">2.00<", ">2.10<")] == [True] * 3


@pytest.mark.parametrize(("value", "text"), [(0.0, "< 0.001"), (0.001, "0.001"), (0.049, "0.049")])
def test_p_values(value, text):
    assert p_text(value) == text


def test_the_bench_page_scores_every_method_on_every_finetune(bench):
    for row in FINETUNES:
        title = row.title[0].upper() + row.title[1:]
        assert [line[0] for line in cells(bench, f"{title} <span>")] == list(METHODS)
    assert cells(bench, "Tickets with 9 % harmful <span>")[0][1:] == [
        "0.2",
        "-0.1 -1.6 to +1.4",
        "+2.2 -0.3 to +4.7",
        "63.5 % 58.5–68.5 %",
        "yes",
        "3.5 s",
    ]
    assert bench.count("<figure>") == len(FINETUNES)
    assert "false refusals 5.0 % aligned, 2.0 % fine-tuned" in bench
    assert "<p>Once per aligned model: store 44.0 s, safe 1 min 0 s.</p>" in bench


def test_the_bench_page_holds_every_number_folded(bench):
    report = bench_report()
    assert len(cells(bench, "Points of the curves ")) == len(report.curves)
    assert len(cells(bench, "Every model measured ")) == len(report.cells)
    assert all("open" not in tag for tag in re.findall(r"<details[^>]*>", bench))
    assert ATTACK not in bench
    assert "NLL, general" in bench


def test_the_bench_page_tells_how_it_was_run_without_the_folders_it_was_run_in(bench):
    report = bench_report()
    told = f"{report.aligned} {report.command} {report.settings}"
    assert told.count("/home/someone") == 5
    assert "~/someone" in told
    assert "someone" not in bench
    assert (
        "deltaguard bench aligned &#39;--attack-prompts=my prompts.csv&#39; --pretrained owner/name" in bench
    )
    assert (
        "33 min 4 s (store 44.0 s, safe 1 min 0 s, fine-tunes 6 min 20 s, request 2 min 30 s, measure"
        in bench
    )
    assert "preset (name quick, cache (cache, (data prompts.csv)))" in bench


def test_the_bench_page_says_beside_the_plot_what_it_does_not_show():
    report = bench_report()
    bench = bench_page(report)
    assert "Not drawn" not in bench
    some = bench_page(without_share(report, "identity", {"greedy", "resta"}))
    assert f"Not drawn, without a bounded share of gain: 6 of {3 * len(METHODS)} points." in some
    whole = bench_page(without_share(report, "identity", set(METHODS)))
    count = 3 * len(METHODS)
    assert (
        f"<p>Identity shift: not drawn, without a bounded share of gain: {count} of {count} points.</p>"
        in whole
    )
    assert whole.count("<figure>") == len(FINETUNES) - 1
