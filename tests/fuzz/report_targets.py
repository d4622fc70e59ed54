"""Reports, read and drawn, and what a bench keeps."""

import json
from collections.abc import Callable
from pathlib import Path

from mutators import damage_json, damage_lines, damage_report
from rich.console import Console, RenderableType

from attack_reports import attacks_report
from bench_reports import FINETUNES, bench_report, cell
from deltaguard.cli.report import draw_folder
from deltaguard.cli.sink import Printable
from deltaguard.evaluation.garak import garak_report
from deltaguard.files import read_json
from deltaguard.reports.attacks import attacks_markdown, attacks_table
from deltaguard.reports.bench import bench_markdown, bench_table
from deltaguard.reports.card import model_card
from deltaguard.reports.demo import demo_table
from deltaguard.reports.evaluation import evaluation_card, evaluation_table
from deltaguard.reports.records.attacks import ATTACKS_NAME, AttackCell, AttacksReport
from deltaguard.reports.records.base import Record
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport, Cell
from deltaguard.reports.records.demo import DEMO_NAME
from deltaguard.reports.records.evaluation import EVALUATION_NAME, EvaluationReport
from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
from deltaguard.reports.records.sweep import SWEEP_NAME
from deltaguard.reports.restore import restore_table
from deltaguard.reports.sweep import sweep_table
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.restoration.verify import verify
from deltaguard.studies.attack_score import outcomes
from deltaguard.studies.cells import CellStore
from deltaguard.studies.run import _require_same
from deltaguard.studies.score import cells_by_finetune, contests, curves, scores
from pairs import pair
from reports import MODELS, evaluation_report, sweep_report
from restores import demo_report, restore_report
from targets import Kind, Target, in_file


def shown(drawing: RenderableType, folder: Path) -> None:
    with (folder / "terminal.txt").open("w", encoding="ascii", errors="backslashreplace") as stream:
        Console(file=stream, width=80, markup=False).print(Printable(drawing))


def drawn(name: str, report: Record, draw: Callable[[Record, Path], object]) -> Callable[[Path], Target]:
    """The report is read and drawn as a page, and as all else that is made of it."""

    def make(folder: Path) -> Target:
        path = folder / name

        def read() -> None:
            draw_folder(folder)
            draw(read_json(path, type(report), remedy="Run again."), folder)

        return in_file(path, damage_report, read, report.model_dump_json().encode())

    return make


def draw_restore(report: RestoreReport, folder: Path) -> None:
    shown(restore_table(report), folder)
    (folder / "README.md").write_text(model_card(report, front_matter={"license": "mit"}), encoding="utf-8")


def draw_bench(report: BenchReport, folder: Path) -> None:
    shown(bench_table(report), folder)
    (folder / "bench.md").write_text(bench_markdown(report), encoding="utf-8")


def draw_attacks(report: AttacksReport, folder: Path) -> None:
    shown(attacks_table(report), folder)
    (folder / "attacks.md").write_text(attacks_markdown(report), encoding="utf-8")


def draw_evaluation(report: EvaluationReport, folder: Path) -> None:
    shown(evaluation_table(report), folder)
    (folder / "README.md").write_text(evaluation_card(report), encoding="utf-8")


def small_bench() -> BenchReport:
    whole = bench_report(methods=("greedy", "resta"))
    kept = {
        field: tuple(row for row in getattr(whole, field) if row.finetune == FINETUNES[0].name)
        for field in ("cells", "curves", "scores", "contests")
    }
    kept["cells"] = tuple(row for row in kept["cells"] if row.method in ("aligned", "finetuned", "greedy"))
    return whole.model_copy(update={**kept, "finetunes": FINETUNES[:1]})


def verified(folder: Path) -> Target:
    made, out = pair(), folder / "out"
    config = RestoreConfig(method="interpolate", strength=0.5)
    restore(made.aligned, made.finetuned, out, config=config)
    return in_file(out / REPORT_NAME, damage_json, lambda: verify(out))


def cells(folder: Path) -> Target:
    """A cell is read, and scored beside the others."""
    row = FINETUNES[0]
    others = [cell(row.name, 0, "aligned", None, 0.1, 2.0), cell(row.name, 0, "finetuned", None, 0.8, 2.5)]
    good = cell(row.name, 0, "greedy", 0.2, 0.2, 2.1)
    counts = ("attack", "harmless", "utility", "general")
    shelf = CellStore(folder)

    def fits(found) -> bool:
        named = (found.finetune, found.seed, found.method, found.strength) == (row.name, 0, "greedy", 0.2)
        named = named and found.seconds.keys() >= {"request", "measure"}
        return named and all(len(getattr(found, each)) == len(getattr(good, each)) for each in counts)

    def read() -> None:
        found = cells_by_finetune(FINETUNES[:1], [*others, shelf.cell(good.key, Cell, fits, lambda: good)])
        contests(found, scores(found, curves(found, bound=2.0)))

    return in_file(folder / "cells" / f"{good.key}.json", damage_json, read, good.model_dump_json().encode())


def attack_cells(folder: Path) -> Target:
    """A cell of an attacker is read, and judged beside the others."""
    report, shelf = attacks_report(), CellStore(folder)
    *others, good = report.cells[:3]

    def fits(found: AttackCell) -> bool:
        named = (found.attacker, found.seed, found.method) == (good.attacker, good.seed, good.method)
        counts = ("plain", "wrapped", "harmless", "utility")
        return named and all(len(getattr(found, each)) == len(getattr(good, each)) for each in counts)

    def read() -> None:
        found = shelf.cell(good.key, AttackCell, fits, lambda: good)
        outcomes(report.attackers, [*others, found], bound=2.0)

    return in_file(folder / "cells" / f"{good.key}.json", damage_json, read, good.model_dump_json().encode())


def bench_seconds(folder: Path) -> Target:
    shelf = CellStore(folder)
    path = folder / "seconds.json"
    return in_file(path, damage_json, lambda: shelf.note_seconds("store", 1.0), b'{"store": 1.5, "task": 3}')


def bench_settings(folder: Path) -> Target:
    path, values = folder / "settings.json", {"preset": {"name": "quick"}, "attacks": None}
    return in_file(
        path, damage_json, lambda: _require_same(path, values, "settings"), json.dumps(values).encode()
    )


SMALL_EVALUATION = evaluation_report().model_copy(
    update={
        "measures": tuple(
            each for each in evaluation_report().measures if each.section in ("attack", "everyday")
        ),
        "sections": tuple(
            each for each in evaluation_report().sections if each.name in ("attack", "everyday")
        ),
        "harness": evaluation_report().harness[: len(MODELS)],
    }
)


def garak(folder: Path) -> Target:
    """Read, judged, and drawn as an evaluation."""
    path = folder / "m.report.jsonl"
    rows = [
        {"entry_type": "start_run setup", "plugins.target_name": "m", "run.eval_threshold": 0.5},
        {"entry_type": "init", "garak_version": "0.17.1"},
        {
            "entry_type": "attempt",
            "status": 2,
            "probe_classname": "suffix.GCGCached",
            "prompt": {"turns": [{"role": "user", "content": {"text": "How, m?"}}]},
            "outputs": [{"text": "I'm sorry, but no."}, None],
            "detector_results": {"mitigation.MitigationBypass": [0.0, None]},
        },
        {"entry_type": "completion"},
    ]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return in_file(path, damage_lines, lambda: garak_report({"m": path}, folder / "out"), good)


KINDS = (
    Kind("report of garak", 60, garak),
    Kind("report of a restore", 45, drawn(REPORT_NAME, restore_report(blocks=2), draw_restore)),
    Kind("report of a demo", 20, drawn(DEMO_NAME, demo_report(), lambda r, f: shown(demo_table(r), f))),
    Kind("report of a sweep", 45, drawn(SWEEP_NAME, sweep_report(), lambda r, f: shown(sweep_table(r), f))),
    Kind("report of a bench", 20, drawn(BENCH_NAME, small_bench(), draw_bench)),
    Kind("report of attackers", 20, drawn(ATTACKS_NAME, attacks_report(), draw_attacks)),
    Kind("cell of an attacker", 30, attack_cells),
    Kind("report of an evaluation", 20, drawn(EVALUATION_NAME, SMALL_EVALUATION, draw_evaluation)),
    Kind("report that is verified", 60, verified),
    Kind("cell of a bench", 60, cells),
    Kind("seconds of a bench", 40, bench_seconds),
    Kind("settings of a bench", 60, bench_settings),
)
