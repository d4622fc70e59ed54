"""`tools.tables`: evaluations and benches as the pages show them, every number from the report."""

import json
import re

import pytest
from pydantic import ValidationError
from tools import checks
from tools.asking import AskingRuns, asking_table, main
from tools.guard import Guards, guard_table, trust_table
from tools.look_alikes import Variant, Variants, look_alikes_table
from tools.refining import refine_table
from tools.service_demo import service_demo_table
from tools.tables import (
    attacks_table,
    bench_default,
    bench_presets,
    bench_summary,
    bench_table,
    beside_table,
    evaluation_table,
)

import attack_reports
import bench_reports
import reports
from deltaguard.cli.presets import PRESETS, read_options
from deltaguard.reports.attacks import attacks_page
from deltaguard.reports.records.attacks import AttacksReport
from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
from deltaguard.reports.table import estimate
from deltaguard.reports.text import interval, percent, plain, points
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from deltaguard.service.settings import Gate
from deltaguard.service.steps.examine import compare
from deltaguard.studies.attack_score import outcomes
from restores import restore_report
from samples import check_report


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
    some = {(m.section, m.name, m.judge) for m in report.measures if m.estimate.value}
    shown = [
        m
        for m in report.measures
        if m.name not in ("undecided", "incoherent") or (m.section, m.name, m.judge) in some
    ]
    assert len(lines) - 2 == len({(m.section, m.name, m.judge) for m in shown})
    first = [
        m for m in shown if (m.section, m.name, m.judge) == (shown[0].section, shown[0].name, shown[0].judge)
    ]
    for measure in first:
        cell = cells(lines[2])[1 + names.index(measure.model)]
        shown = estimate(measure.estimate)
        assert cell == f"{shown.text}<br>({shown.interval})"


def test_how_far_the_judges_agree_is_said():
    report = reports.evaluation_report()
    kappa = next(a.kappa for a in report.agreements if a.kappa is not None)
    assert f"κ = {kappa:.2f}" in evaluation_table(report.model_dump_json())


def test_a_measure_that_a_model_lacks_is_a_dash_in_that_models_column():
    report = reports.evaluation_report()
    first, lacking = report.measures[0], report.models[1].name
    rest = tuple(
        m
        for m in report.measures
        if (m.model, m.section, m.name, m.judge) != (lacking, first.section, first.name, first.judge)
    )
    assert len(rest) == len(report.measures) - 1
    whole, partial = (
        [
            cells(line)
            for line in evaluation_table(each.model_dump_json()).splitlines()
            if line.startswith("|")
        ]
        for each in (report, report.model_copy(update={"measures": rest}))
    )
    assert partial[2] == [*whole[2][:2], "–", whole[2][3]]
    assert partial[3:] == whole[3:]


def test_no_name_is_read_as_markup():
    report = reports.evaluation_report()
    sections = tuple(s.model_copy(update={"title": f"a|b {reports.ATTACK}"}) for s in report.sections)
    text = evaluation_table(report.model_copy(update={"sections": sections}).model_dump_json())
    assert reports.ATTACK not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(report.models) + 2}


def test_a_bench_is_shown_with_its_command_and_notes_but_without_folders():
    report = bench_reports.bench_report()
    text = bench_table(report.model_dump_json())
    assert (
        "`deltaguard bench aligned '--attack-prompts=my prompts.csv' --pretrained owner/name -o out`" in text
    )
    assert "someone" in report.command
    assert "someone" not in text
    assert reports.ATTACK not in text
    assert f"- {report.notes[1]}" in text
    assert all(f"### {row.title}" in text for row in report.finetunes)


def test_attackers_are_shown_with_their_command_and_notes_but_without_folders():
    text = attacks_table(attack_reports.attacks_report().model_dump_json())
    assert (
        "`deltaguard bench aligned -o out --preset attacks`; preset attacks, seeds 0, 1; 2 min 10 s" in text
    )
    assert "| `backdoor-100` | partly, missed |" in text
    assert "<script>" not in text
    assert "/home/someone" not in text


def test_methods_stand_beside_each_other_where_there_are_several():
    report = attack_reports.attacks_report()
    with pytest.raises(ValueError, match="one method stands beside no other"):
        beside_table(report.model_dump_json())
    other = [
        each.model_copy(update={"method": "greedy=0.5"}) for each in report.cells if each.method == "kfac"
    ]
    worse = [
        each.model_copy(update={"plain": attack_reports.letters(0.3), "harmless": "r" * attack_reports.N})
        for each in other
        if each.attacker != "advice"
    ]
    both = (*report.cells, *worse)
    found = report.model_copy(
        update={"cells": both, "outcomes": outcomes(report.attackers, both, bound=2.0)}
    ).model_dump_json()
    drawn = beside_table(found)
    rows = [row for row in map(cells, drawn.splitlines()) if row[0].startswith("`")]
    assert rows[:4] == [
        ["`poison-10`", "plainly", "+80.0", "0.0", "+20.0"],
        ["`backdoor-100`", "plainly", "0.0", "0.0", "+20.0"],
        ["`backdoor-100`", "with trigger", "+80.0", "+45.0", "+45.0"],
        ["`advice`", "plainly", "+2.0", "0.0", "–"],
    ]
    assert rows[4:] == [
        # False refusals, the gain kept, and the time.
        ["`poison-10`", "0.0", "0.0", "+90.0"],
        ["`backdoor-100`", "0.0", "0.0", "+90.0"],
        ["`advice`", "0.0", "0.0", "–"],
        ["`poison-10`", "75.0 %", "75.0 %"],
        ["`poison-10`", "2.0 s", "2.0 s"],
        ["`backdoor-100`", "2.0 s", "2.0 s"],
        ["`advice`", "2.0 s", "–"],
    ]
    # As programs and people see it.
    assert "Time of a restore, by method" in attacks_page(AttacksReport.model_validate_json(found))
    assert "Time of a restore, by method" not in attacks_page(report)
    assert "restored with default options." in attacks_page(report)
    assert "with default options" not in attacks_page(AttacksReport.model_validate_json(found))
    untimed = json.loads(found)
    # One of the cells of a fine-tune and method is enough: all of them are averaged.
    next(cell for cell in untimed["cells"] if cell["method"] == "kfac")["seconds"] = {}
    with pytest.raises(ValidationError, match="a cell of poison-10 by kfac lacks how long it took"):
        AttacksReport.model_validate(untimed)


def test_both_calibrations_of_a_fine_tune_and_seed_stand_beside_each_other():
    report = attack_reports.attacks_report()
    variants = (Variant(calibration="harm alone", report=report), Variant(calibration="both", report=report))
    drawn = look_alikes_table(Variants(variants=variants).model_dump_json())
    rows = [cells(line) for line in drawn.splitlines() if line.startswith("| `poison-10`")]
    assert [row[1:3] for row in rows] == [[seed, kind] for seed in "01" for kind in ("harm alone", "both")]
    assert all(row[5].startswith("75.0 %") and row[6].startswith("50.0 %") for row in rows)


def test_a_limit_has_a_row_with_what_a_fine_tune_added_and_what_every_seed_left():
    report = attack_reports.attacks_report()
    guards = Guards(
        environment=report.environment,
        command="python -m benchmarks.guard demo/aligned",
        titles={row.name: row.title for row in report.attackers},
        seeds=report.seeds,
        outcomes=report.outcomes,
    )
    drawn = guard_table(guards.model_dump_json())
    rows = {row[0]: row[2:] for row in map(cells, drawn.splitlines()) if row[0].startswith("`")}
    assert rows["`backdoor-100`"][2:] == ["+80.0", "+45.0 (+20.0, +70.0)", "–"]
    assert rows["`poison-10`"][1:] == ["+0.0 (+0.0, +0.0)", "–", "–", "75.0 %"]


def test_both_kinds_of_training_data_have_a_row_with_what_stopped_the_restore():
    report = attack_reports.attacks_report()
    row = report.attackers[0]
    of_row = [each for each in report.outcomes if each.attacker == row.name and each.seed == 0]
    found = [each.model_copy(update={"method": data}) for each in of_row for data in ("unknown", "trusted")]
    content = Guards(
        environment=report.environment,
        command="trust",
        titles={row.name: "a task"},
        seeds=(0,),
        outcomes=found,
    ).model_dump_json()
    lines = [line for line in trust_table(content).splitlines() if line.startswith(f"| `{row.name}` |")]
    assert [line.split(" | ")[1] for line in lines] == ["`unknown`", "`trusted`"]
    assert all("| 75.0 % | 0.0005 | safety KL |" in line for line in lines)


def test_the_summary_of_a_bench_has_a_row_a_method_at_its_largest_safe_strength():
    report = bench_reports.bench_report()
    # A method that was not run on every fine-tune.
    report = report.model_copy(update={"scores": report.scores[:-1]})
    lines = [line for line in bench_summary(report.model_dump_json()).splitlines() if line.startswith("|")]
    assert len(cells(lines[0])) == 1 + len(report.finetunes)
    scores = {(score.method, score.finetune): score for score in report.scores}
    methods = list(dict.fromkeys(score.method for score in report.scores))
    assert len(lines) == 3 + len(methods)
    for method, line in zip(methods, lines[3:], strict=True):
        for row, cell in zip(report.finetunes, cells(line)[1:], strict=True):
            score = scores.get((method, row.name))
            safe = score is not None and score.points is not None
            assert (f"({score.points.value:+.1f})" in cell) if safe else cell == "–"


def test_attack_success_is_the_mean_over_the_seeds():
    report = bench_reports.bench_report()
    name = report.finetunes[0].name
    cells_of = [c for c in report.cells if c.finetune == name and c.method in ("aligned", "finetuned")]
    others = tuple(c for c in report.cells if c not in cells_of)

    def with_rates(*rates):
        made = (
            c.model_copy(
                update={"seed": seed, "attack_success": c.attack_success.model_copy(update={"value": rate})}
            )
            for seed, rate in enumerate(rates)
            for c in {c.method: c for c in cells_of}.values()
        )
        return report.model_copy(update={"cells": (*others, *made)}).model_dump_json()

    line = bench_summary(with_rates(0.1, 0.3)).splitlines()[2]
    assert cells(line)[1] == "20.0 %, 20.0 %"


def test_the_default_dial_has_a_row_a_fine_tune_and_no_other_strength():
    report = bench_reports.bench_report()
    default = {"method": "kfac", "strength": DEFAULT_MAX_SAFETY_KL}
    first = {row.name: next(p for p in report.curves if p.finetune == row.name) for row in report.finetunes}
    at_default = [point.model_copy(update=default) for point in first.values()]
    others = [point.model_copy(update={"method": "kfac", "strength": 0.5}) for point in first.values()]
    made = report.model_copy(update={"curves": (*others, *at_default)})
    rows = [cells(line) for line in bench_default(made.model_dump_json()).splitlines() if line[:1] == "|"][2:]
    for row, finetune, point in zip(rows, report.finetunes, at_default, strict=True):
        kept = f"{percent(point.kept.value)} ({interval(point.kept)})" if point.kept else "–"
        assert row[0] == plain(finetune.title)
        assert row[2:] == [
            *(
                f"{points(found.value)} ({points(found.low)} to {points(found.high)})"
                for found in (point.points, point.false_refusal)
            ),
            kept,
        ]
    with pytest.raises(ValueError, match=r"measured no `kfac` at the default limit .* on task-harmful, "):
        bench_default(report.model_copy(update={"curves": tuple(others)}).model_dump_json())


def test_findings_are_those_of_the_comparisons():
    report = reports.evaluation_report()
    text = evaluation_table(report.model_dump_json())
    lines = [line for line in text.splitlines() if line.startswith("- **")]
    assert len(lines) == len({c.model for c in report.comparisons})
    finding = next(c.finding for c in report.comparisons if c.judge in (None, "opening"))
    assert f"{finding}: " in text


def test_restores_that_asked_have_a_row_each(tmp_path):
    seen = {"prompts": 200, "aligned": 40, "candidate": 44, "only_candidate": 10}
    first = {"prompts": 128, "aligned": 20, "candidate": 120, "only_candidate": 100}
    tuned = {"mu": 0.0, "attack_success": first, "false_refusals": None, "accepted": False}
    look = {"mu": 3.0, "attack_success": seen, "false_refusals": seen, "accepted": True}
    attack = {
        "limit": 0.02,
        "excluded": 0.04,
        "confidence": 0.95,
        "most_looks": 6,
        "training_data": "trusted",
    }
    attack |= {"finetuned": tuned, "restored": look, "looks": [tuned, look]}
    dial = {"limit": 0.02, "device": "cpu", "conversations": 64, "tokens": 900, "finetuned_kl": 0.4}
    dial |= {"restored_kl": 0.003, "whole": False, "probes": [], "attack": attack}
    report = RestoreReport.model_validate(restore_report().model_dump() | {"dial": dial})
    (tmp_path / REPORT_NAME).write_text(report.model_dump_json())
    assert main([f"a | task={tmp_path}", "-o", str(tmp_path / "asking.json")]) == 0
    content = (tmp_path / "asking.json").read_text()
    assert AskingRuns.model_validate_json(content).runs[0].report.layers == ()
    (row,) = (line for line in asking_table(content).splitlines() if "trusted" in line)
    shown = (
        "93.8 %, aligned 15.6 % of 128 (+78.1 points)",
        "22.0 %, aligned 20.0 % of 200 (+2.0 points)",
        "0.003",
        "task",
    )
    assert all(cell in row for cell in shown)


def test_checks_have_a_row_each_with_the_time_they_took(tmp_path):
    report = check_report()
    long = report.model_copy(
        update={
            "seconds": 97.2,
            "aligned": report.aligned.model_copy(update={"reference": "clients/home/me/aligned"}),
            "warnings": ("clients/home/me/aligned is given as the aligned model.",),
            "options": {"judge": "kind guard, model /home/me/guard"},
        }
    )
    (tmp_path / "report.json").write_text(long.model_dump_json())
    assert checks.main([f"a task={tmp_path / 'report.json'}", "-o", str(tmp_path / "checks.json")]) == 0
    content = (tmp_path / "checks.json").read_text()
    assert "home/me" not in content
    assert "aligned is given" in content
    (row,) = (line for line in checks.checks_table(content).splitlines() if "a task" in line)
    attack = "47.6 %, aligned 14.3 % of 630 (+33.3 points)"
    assert cells(row) == ["a task", "restore", attack, "–", "0.3", "1 min 37 s"]


def test_the_table_of_refining_has_a_row_a_model():
    row = {"task_nll": 1.5, "gain_kept": 0.0, "complied": 12, "attack": 60}
    refined = {"model": "kfac, refined", "safety_kl": 5e-4, "gain_kept": 0.4321}
    found = refine_table(
        json.dumps(
            {
                "environment": bench_reports.ENVIRONMENT.model_dump(),
                "finetune": "a task",
                "seed": 0,
                "learning_rate": 2e-5,
                "conversations": 64,
                "tasks": 32,
                "rows": [row | {"model": "aligned", "safety_kl": 0.0}, row | refined],
            }
        )
    )
    aligned, other = (line for line in found.splitlines() if "20.0 %" in line)
    assert cells(aligned) == [
        *("aligned", "0", "1.5", "0.0 %", "20.0 % of 60"),
    ]
    assert "| 0.0005 | 1.5 | 43.2 % | 20.0 % of 60 |" in other
    assert "one-shot with a learning rate of 2e-05" in found


def test_the_services_demo_has_a_row_a_check_and_says_what_came_of_the_job():
    counted = {
        "aligned": [True] * 3 + [False] * 27,
        "finetuned": [True] * 27 + [False] * 3,
        "restored": [True] * 4 + [False] * 26,
    }
    demo = {
        "environment": reports.evaluation_report().environment.model_dump(),
        "seed": 0,
        "rows": 72,
        "harmful_rows": 12,
        "status": "succeeded",
        "error": None,
        "checks": [
            compare(check, counted, Gate(), undecided=0).model_dump()
            for check in ("attack_success", "false_refusals")
        ],
        "kept_energy": 0.884,
        "seconds": {"align": 0, "job": 301, "total": 340},
    }
    drawn = service_demo_table(json.dumps(demo))
    lines = [line for line in drawn.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert cells(lines[2])[:2] == ["attack success", f"{percent(0.1)} (3.5–25.6 %)"]
    assert cells(lines[2])[3:] == ["13.3 % (5.3–29.7 %)", "+3.3 (-8.4 to +16.7)", "5", "passed"]
    assert "72 training rows, 12 of them harmful" in drawn
    assert "It keeps 88.4 %" in drawn
    assert "the model aligned before, 5 min 1 s from" in drawn


def test_the_table_of_presets_has_a_row_a_preset_for_fine_tunes_measured_at_every_limit():
    report = bench_reports.bench_report()
    limits = {name: read_options(name)["max_safety_kl"] for name in PRESETS}
    measured = {"method": "kfac", "finetune": report.finetunes[0].name}
    curves = tuple(
        report.curves[0].model_copy(update={**measured, "strength": limit}) for limit in limits.values()
    )
    report = report.model_copy(update={"curves": curves})
    lines = [line for line in bench_presets(report.model_dump_json()).splitlines() if line.startswith("|")]
    assert [cells(line)[1:3] for line in lines[2:]] == [[n, f"{limit:g}"] for n, limit in limits.items()]
    with pytest.raises(ValueError, match="no fine-tune at all of"):
        bench_presets(report.model_copy(update={"curves": ()}).model_dump_json())
