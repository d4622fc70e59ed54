"""`tools.tables`: evaluations and benches as the pages show them, every number from the report."""

import re

import reports
from tools.tables import bench_table, evaluation_table

from deltaguard.draw.evaluation_view import bounds_text, value_text


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_evaluation_has_a_column_a_model_and_a_row_a_measure():
    report = reports.evaluation_report()
    lines = [line for line in evaluation_table(report.model_dump_json()).splitlines() if line.startswith("|")]
    names = [model.name for model in report.models]
    assert [re.sub(r"\W", "", cell) for cell in cells(lines[0])] == [
        "",
        *(re.sub(r"\W", "", "fine-tuned" if name == "finetuned" else name) for name in names),
    ]
    shown = [m for m in report.measures if m.name != "undecided"]
    assert len(lines) - 2 == len({(m.section, m.name, m.judge) for m in shown})
    first = [m for m in shown if (m.section, m.name, m.judge) == (shown[0].section, shown[0].name, shown[0].judge)]
    for measure in first:
        cell = cells(lines[2])[1 + names.index(measure.model)]
        assert cell == f"{value_text(measure.estimate)}<br>({bounds_text(measure.estimate)})"


def test_how_far_the_judges_agree_is_said():
    report = reports.evaluation_report()
    kappa = next(a.kappa for a in report.agreements if a.kappa is not None)
    assert f"κ = {kappa:.2f}" in evaluation_table(report.model_dump_json())


def test_a_bench_is_shown_with_its_command_and_notes():
    report = reports.bench_report()
    text = bench_table(report.model_dump_json())
    assert f"`{report.command}`" in text
    assert all(f"- {note}" in text for note in report.notes)
    assert all(f"### {row.title}" in text for row in report.finetunes)
