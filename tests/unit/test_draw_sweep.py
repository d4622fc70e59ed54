"""A sweep as people read it: the report's own arithmetic, the terminal table, the chart and the page."""

import io
import re
from html import unescape
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from pydantic import ValidationError
from rich.console import Console

from bench_reports import ATTACK
from deltaguard.cli.report import draw_folder
from deltaguard.reports.charts import at_edge, sweep_chart
from deltaguard.reports.records.base import ModelReference
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepReport
from deltaguard.reports.sweep import sweep_line, sweep_notes, sweep_page, sweep_table
from reports import LIMITS, SWEPT, sweep_report, swept
from restores import restore_report

SVG = "{http://www.w3.org/2000/svg}"
NOTHING = swept(1e30, -4e-9, 0.0, 2.113)


def without_utility(points=SWEPT):
    """A report of a sweep to which no utility data was given."""
    bare = tuple(point.model_copy(update={"utility_nll": None}) for point in points)
    return sweep_report(bare, utility_conversations=0, aligned_nll=None, finetuned_nll=None)


def lines(report, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(sweep_table(report))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(report, name):
    """The numbers of a line of the terminal table."""
    last = next(line for line in reversed(lines(report)) if line.split()[:1] == [name])
    return re.split(r" {2,}", last.strip())[1:]


def parsed(svg):
    return ET.fromstring(svg)  # noqa: S314 - drawn here


def texts(svg):
    return [element.text for element in parsed(svg).iter(f"{SVG}text")]


def symbols(svg):
    """Place, fill and outline of each mark."""
    groups = [g for g in parsed(svg).iter(f"{SVG}g") if "mark-symbol" in g.get("class", "")]
    moved = re.compile(r"translate\((\S+?),(\S+?)\)")
    return [
        (*map(float, moved.search(p.get("transform")).groups()), p.get("fill"), p.get("d"))
        for g in groups
        for p in g
    ]


def cells(page, caption):
    """The rows of the table under a caption, as texts."""
    table = page.split(f"<caption>{caption}", 1)[1].split("</table>", 1)[0].split("<tbody>")[1]
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    parts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in found]
    return [[" ".join(unescape(re.sub("<[^>]+>", " ", part)).split()) for part in line] for line in parts]


def test_a_report_survives_json():
    report = sweep_report((NOTHING, *SWEPT), {1e-6: None, **LIMITS})
    assert SweepReport.model_validate_json(report.model_dump_json()) == report
    bare = without_utility()
    assert SweepReport.model_validate_json(bare.model_dump_json()) == bare
    with pytest.raises(ValidationError, match="of_another_time"):
        SweepReport.model_validate_json(report.model_dump_json()[:-1] + ', "of_another_time": 1}')


def test_the_gain_kept_is_a_share_of_what_finetuning_gained():
    report = sweep_report(aligned_nll=2.0, finetuned_nll=1.0)
    assert report.kept_gain(swept(1.0, 1e-4, 0.5, 1.75)) == 0.25
    assert report.kept_gain(swept(1.0, 1e-4, 0.5, 2.5)) == -0.5
    assert report.kept_gain(swept(1.0, 1e-4, 0.5, None)) is None
    assert sweep_report(aligned_nll=2.0, finetuned_nll=2.0).kept_gain(SWEPT[0]) is None


def test_the_table_has_a_row_a_limit_between_the_two_models():
    report = sweep_report()
    assert row(report, "aligned") == ["0", "0.0 %", "2.113", "0.0 %", "–"]
    assert row(report, "0.0001") == ["9.3e-05", "14.3 %", "1.633", "27.1 %", "1.4e+07"]
    assert row(report, "fine-tuned") == ["0.35", "100.0 %", "0.341", "100.0 %", "whole model"]
    assert max(map(len, lines(report))) <= 80
    assert not any("…" in line for line in lines(report))
    told = "\n".join(lines(report))
    assert "64 held-out safety conversations (2117 tokens)" in told
    assert "my-finetune" in told
    assert "/home/someone" not in told


def test_without_utility_data_only_the_delta_is_told():
    report = without_utility()
    assert row(report, "0.0001") == ["9.3e-05", "14.3 %", "1.4e+07"]
    assert "NLL" not in "\n".join(lines(report))
    assert "utility data" not in "\n".join(lines(report))
    assert "6.2 % of the delta's energy, and 58.3 % within 0.003." in sweep_line(report)


def test_what_was_measured_stands_with_its_interval_and_the_confidence_asked_for():
    points = tuple(point.model_copy(update={"margin": 0.4 * abs(point.safety_kl)}) for point in SWEPT)
    report = sweep_report(points, confidence=0.95)
    told = lines(report)
    below = told[next(n for n, line in enumerate(told) if line.startswith(" 0.0001 ")) + 1]
    assert below.split() == ["±", "3.7e-05"]
    assert cells(sweep_page(report), "What each limit of safety KL allows")[2][1] == "9.3e-05 ± 3.7e-05"
    assert re.search("confidence +95.0 %", "\n".join(told))


def test_one_limit_is_one_number():
    told = "Within a safety KL of 0.0001 nats a token a restore keeps 27.1 % of the gain in likelihood."
    assert sweep_line(sweep_report(limits={1e-4: 1.4e7})) == told


def test_a_limit_that_no_point_is_within_is_said():
    report = sweep_report(limits={1e-6: None, 2e-5: None, **LIMITS})
    assert row(report, "1e-06") == ["–", "–", "–", "–", "no point within"]
    (note,) = sweep_notes(report)
    assert note.startswith("No point is within 1e-06 or 2e-05: the safest has a safety KL of 2.9e-05.")
    assert " ".join(note.split()) in " ".join(" ".join(lines(report)).split())
    assert "--config-from" not in note
    (note,) = sweep_notes(report.model_copy(update={"config_from": "finetuned", "confidence": 0.95}))
    assert "2e-05 with a confidence of 95.0 %: the safest has a safety KL of 2.9e-05 in the mean." in note
    assert "(--config-from aligned), norms" in note
    nothing = sweep_report(limits={1e-6: None})
    assert sweep_line(nothing) == "No point is within any of the limits asked for."


def test_a_finetuned_model_that_is_within_a_limit_is_said():
    report = sweep_report(finetuned_kl=2e-3)
    assert row(report, "0.003") == ["0.002", "100.0 %", "0.341", "100.0 %", "whole model"]
    assert row(report, "0.001")[0] == "0.00096"
    assert sweep_notes(report)[0].startswith("The whole fine-tuned model is within 0.003 already")
    every = sweep_report(finetuned_kl=-1e-9, limits={1e-5: None, 1e-4: 0.0})
    assert sweep_line(every).startswith("The whole fine-tuned model is within every limit asked for")
    assert len(sweep_notes(every)) == 1


def test_without_a_gain_the_share_of_the_delta_is_told():
    report = sweep_report(finetuned_nll=2.2)
    assert row(report, "0.0001") == ["9.3e-05", "14.3 %", "1.633", "–", "1.4e+07"]
    assert "there is no gain to keep" in sweep_notes(report)[0]
    assert "6.2 % of the delta's energy, and 58.3 % within 0.003." in sweep_line(report)
    assert "share of the delta's energy kept" in texts(sweep_chart(report))


def test_the_chart_draws_every_point_and_the_finetuned_model():
    svg = sweep_chart(sweep_report())
    *points, whole = symbols(svg)
    assert len(points) == len(SWEPT)
    assert [x for x, *_ in points] == sorted(x for x, *_ in points)
    assert [y for _, y, *_ in points] == sorted((y for _, y, *_ in points), reverse=True)
    assert whole[0] > points[-1][0]
    assert whole[1] < points[-1][1]
    assert {fill for *_, fill, _ in points} == {"var(--c2, #0a7454)"}
    assert whole[2] == "var(--c1, #b8420a)"
    chosen = [place for place, (*_, outline) in enumerate(points) if outline == points[0][3]]
    assert [SWEPT[place].mu for place in chosen] == list(LIMITS.values())
    assert "share of the gain kept" in texts(svg)
    assert not re.search(r"url\(|<script|<image", svg)


def test_equal_steps_on_the_chart_are_equal_factors_of_safety_kl():
    marks = symbols(sweep_chart(sweep_report([swept(1.0, kl, 0.5, 1.0) for kl in (1e-4, 1e-3, 1e-2)])))
    left, middle, right = (x for x, *_ in marks[:3])
    assert middle - left == pytest.approx(right - middle, abs=0.01)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (LIMITS, ["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]),
        ({1e-4: None, 1.1e-4: None, 0.0125: None}, ["1e-4", "1.25e-2"]),
    ],
)
def test_every_limit_is_a_line_and_named_where_there_is_room(limits, named):
    svg = sweep_chart(sweep_report(limits=limits))
    rules = [e for e in parsed(svg).iter(f"{SVG}line") if e.get("stroke-dasharray")]
    assert len(rules) == len(limits)
    assert [e.text for e in parsed(svg).iter(f"{SVG}text") if e.get("font-size") == "11px"] == named


def test_points_without_a_place_on_the_scale_stand_at_its_left_edge():
    far = swept(1e12, 1e-9, 0.001, 2.112)
    report = sweep_report((NOTHING, far, *SWEPT))
    marks = symbols(sweep_chart(report))
    assert at_edge(report) == 2
    assert marks[0][0] == marks[1][0] == 0
    assert marks[2][0] > 0
    assert "2 points stand at the left edge" in sweep_page(report)
    assert "left edge" not in sweep_page(sweep_report())


@pytest.mark.parametrize(
    ("points", "kl"),
    [((swept(0.0, 0.3, 1.0, 0.4),), 0.3), ((swept(0.0, -1e-9, 1.0, 0.4),), 0.0), ((NOTHING,), -1e-9)],
)
def test_one_point_is_a_chart_too(points, kl):
    svg = sweep_chart(sweep_report(points, {1e-4: None}, finetuned_kl=kl))
    assert len(symbols(svg)) == 2
    assert "NaN" not in svg
    assert len([text for text in texts(svg) if re.fullmatch(r"\de-\d", text)]) >= 3


def test_the_page_has_a_row_a_limit_and_every_point():
    report = sweep_report()
    page = sweep_page(report)
    limits, points = cells(page, "What each limit of safety KL allows"), cells(page, "Every point measured")
    assert limits[2] == ["0.0001", "9.3e-05", "14.3 %", "1.633", "27.1 %", "1.4e+07"]
    assert [line[0] for line in limits] == ["aligned", *map("{:g}".format, LIMITS), "fine-tuned"]
    assert len(points) == len(SWEPT)
    assert points[1] == ["1.4e+07", "9.3e-05", "0.00012", "14.3 %", "1.633", "27.1 %", "0.0001"]
    assert points[-1][-1] == "–"
    assert sweep_line(report) in page
    assert page.count('<td data-value="1.633">1.633</td>') == 2
    bare = cells(sweep_page(without_utility()), "What each limit of safety KL allows")
    assert bare[2] == ["0.0001", "9.3e-05", "14.3 %", "1.4e+07"]


def test_the_page_tells_what_must_be_known():
    assert "Beware of store." in sweep_page(sweep_report(warnings=("Beware of /home/someone/store.",)))


def test_the_page_tells_the_run_and_escapes_names():
    name = f"/home/someone/{ATTACK.replace('/', '')}"
    page = sweep_page(sweep_report(finetuned=ModelReference(reference=name, fingerprint="f" * 64)))
    assert page.count("<script") == 1
    for fact in ("a" * 64, "f" * 64, "1 June 2025, 12:05 UTC", "torch 2.9.0", "6 min 52 s", "2117"):
        assert fact in page
    assert "/home/someone" not in page


def test_headings_of_the_page_leave_none_out():
    for report in (sweep_report(), sweep_report(limits={1e-6: None, **LIMITS})):
        levels = [int(level) for level in re.findall(r"<h(\d)", sweep_page(report))]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_folder_with_a_sweep_and_a_restore_shows_the_sweep(tmp_path):
    (tmp_path / REPORT_NAME).write_text(restore_report().model_dump_json())
    (tmp_path / SWEEP_NAME).write_text(sweep_report().model_dump_json())
    drawing = draw_folder(tmp_path)
    assert drawing.source == str(tmp_path / SWEEP_NAME)
    assert drawing.left_out == (REPORT_NAME,)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == sweep_page(sweep_report())
