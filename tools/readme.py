"""Puts measured numbers into README.md and the documentation: `python -m tools.readme`.

A page marks where a table belongs with `<!-- demo-table -->` and `<!-- /demo-table -->`. What stands between
the two is drawn from a file in `docs/results/` and never typed; nor is what the program decides and stands
between `<!-- value NAME -->` and `<!-- /value -->`. `--check` writes nothing and exits with 1 where a page is
not up to date.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from deltaguard.reports.curves import bench_svg
from deltaguard.reports.records.bench import BenchReport
from deltaguard.reports.records.demo import DemoReport
from deltaguard.reports.table import Column, Table, rate
from deltaguard.reports.text import duration, model_label, percent, size
from tools.asking import asking_table
from tools.benchmark import benchmark_table
from tools.checks import checks_table
from tools.end_to_end import end_to_end_table
from tools.experiments import experiments_table
from tools.framings import framings_table
from tools.guard import guard_table, trust_table
from tools.look_alikes import look_alikes_table
from tools.paper import paper_table
from tools.picture import demo_picture
from tools.positions import positions_table
from tools.refining import refine_table
from tools.scaling import scaling_table
from tools.service_demo import service_demo_table
from tools.service_results import service_table
from tools.store_size import store_size_table
from tools.strength import strength_table
from tools.tables import (
    attacks_table,
    bench_default,
    bench_presets,
    bench_summary,
    bench_table,
    beside_table,
    evaluation_table,
    made_with,
    small,
)
from tools.values import fill_values

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("docs/results")
PAGES = (
    "README.md",
    "docs/bench.md",
    "docs/compatibility.md",
    "docs/evaluation.md",
    "docs/getting-started.md",
    "docs/how-it-works.md",
    "docs/limits.md",
    "docs/results/index.md",
    "docs/service.md",
    "docs/strength.md",
)
NOT_MEASURED = "*Not measured yet.*"


def demo_table(content: str) -> str:
    """Find the three models of a `DemoReport` side by side.

    Args:
        content: the report as JSON.

    Returns:
        Markdown: a table, and under it what was counted and how it was made.
    """
    report = DemoReport.model_validate_json(content)
    drawn = Table.of(
        "",
        report.models,
        (
            (Column("", "name"), lambda model: f"**{model_label(model.name)}**"),
            ("attack success ↓", lambda model: rate(model.attack_success)),
            ("false refusals ↓", lambda model: rate(model.false_refusal)),
            ("task accuracy ↑", lambda model: rate(model.task_accuracy)),
        ),
    ).markdown()
    first = report.models[0]
    counted = (
        f"In brackets 95 % intervals; {first.attack_success.total} harmful and {first.false_refusal.total} "
        f"harmless prompts, {first.task_accuracy.total} task messages. The restored model keeps "
        f"{percent(report.kept_gain)} of what fine-tuning gained on the task."
    )
    options = report.restore.options
    made = (
        f"Method {options['method']}, {_dial(options)}, seed {report.seed}; "
        f"{duration(_total(report.seconds))} and at most {size(report.peak_memory_bytes)} of memory for the "
        f"whole run. {_asking(report)}{made_with(report.environment)}"
    )
    return "\n\n".join((drawn, counted, small(made)))


def _asking(report: DemoReport) -> str:
    """Say how long the restore asked and measured; nothing where it asked nobody."""
    dial, seconds = report.restore.dial, report.restore.seconds
    if dial is None or dial.attack is None:
        return ""
    found = [
        each for look in dial.attack.looks for each in (look.attack_success, look.false_refusals) if each
    ]
    return (
        f"Its restore took {duration(seconds['ask'])} for {sum(each.prompts for each in found):,} answers of "
        f"candidates, and {duration(seconds['measure'])} for {len(dial.probes)} measurements of safety KL. "
    )


_LIMITS = {
    "max_added_attack_success": "points of attack success added at most",
    "max_safety_kl": "safety KL at most",
    "strength": "strength",
}


def _dial(options: Mapping[str, str | float | bool | None]) -> str:
    """Say what decided how much is kept."""
    limits = [
        f"{words} {options[name]:g}" for name, words in _LIMITS.items() if options.get(name) is not None
    ]
    return " and ".join(limits)


TABLES: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "demo-table": ("demo.json", demo_table),
    "strength-table": ("strength.json", strength_table),
    "benchmark-table": ("benchmark.json", benchmark_table),
    "scaling-table": ("memory.json", scaling_table),
    "end-to-end-1b-table": ("end-to-end-1.1B.json", end_to_end_table),
    "end-to-end-7b-8-table": ("end-to-end-7B-8.json", end_to_end_table),
    "paper-table": ("paper.json", paper_table),
    "store-size-table": ("store-size.json", store_size_table),
    "evaluation-table": ("evaluation.json", evaluation_table),
    "gcg-table": ("gcg.json", evaluation_table),
    "asking-table": ("asking.json", asking_table),
    "level-table": ("level.json", asking_table),
    "checks-table": ("checks.json", checks_table),
    "guard-table": ("guard.json", guard_table),
    "trust-table": ("trust.json", trust_table),
    "framings-table": ("framings.json", framings_table),
    "positions-table": ("positions.json", positions_table),
    "positions-further-table": ("positions-further.json", positions_table),
    "positions-lora-table": ("positions-lora.json", positions_table),
    "positions-finetunes-table": ("positions-finetunes.json", positions_table),
    "attacks-table": ("attacks.json", attacks_table),
    "attacks-hidden-table": ("attacks-hidden.json", attacks_table),
    "attack-methods-table": ("attack-methods.json", beside_table),
    "unseen-table": ("unseen.json", attacks_table),
    "unseen-gemma-table": ("unseen-gemma.json", attacks_table),
    "look-alikes-table": ("look_alikes.json", look_alikes_table),
    "refine-table": ("refine.json", refine_table),
    "bench-table": ("bench.json", bench_table),
    "dial-table": ("dial.json", bench_table),
    "dial-summary-table": ("dial.json", bench_summary),
    "dial-default-table": ("default.json", bench_default),
    "lora-default-table": ("lora.json", bench_default),
    "gemma-default-table": ("gemma.json", bench_default),
    "service-demo-table": ("service_demo.json", service_demo_table),
    "service-table": ("service.json", service_table),
    "presets-table": ("gemma.json", bench_presets),
    "experiments-table": ("experiments.json", experiments_table),
}


def _bench_plot(content: str) -> str:
    return bench_svg(BenchReport.model_validate_json(content))


PLOTS: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "bench.svg": ("bench.json", _bench_plot),
    "demo.svg": ("demo.json", demo_picture),
    "dial.svg": ("dial.json", _bench_plot),
}
"""Pictures in the folder of results: what each is drawn from, and how."""


def fill(page: str, results: Path) -> str:
    """Give a page with every marked place filled anew.

    Args:
        page: the page's text.
        results: the folder with the JSON files.

    Returns:
        The text; a place whose file is missing says that nothing was measured.

    Raises:
        ValueError: a marker has no counterpart or no table, or a file does not have the form it should.
    """
    markers = re.findall(r"<!-- (/?)([\w-]+-table) -->", page)
    opened = [name for closing, name in markers if not closing]
    expected = [(closing, name) for name in opened for closing in ("", "/")]
    unknown = sorted(set(opened) - TABLES.keys())
    if markers != expected or unknown:
        raise ValueError(
            f"markers must come in pairs and be among {', '.join(TABLES)}; found "
            + ", ".join(closing + name for closing, name in markers)
        )
    for name in opened:
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        drawn = _draw(name, results)
        page = place.sub(lambda found, table=drawn: f"{found[1]}\n{table}\n\n{found[2]}", page)
    return page


def update(root: Path, *, check: bool) -> list[str]:
    """Fill all pages of a repository, and draw the plots that stand in them.

    Args:
        root: the repository.
        check: only find out which pages are not up to date.

    Returns:
        The pages that changed, or would.

    Raises:
        ValueError: as `fill`; the message names the page.
    """
    stale: list[str] = []
    for name in PAGES:
        page = root / name
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill_values(fill(text, root / RESULTS))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if filled != text:
            stale.append(name)
            if not check:
                page.write_text(filled, encoding="utf-8")
    return [*stale, *_update_plots(root / RESULTS, check=check)]


def _update_plots(results: Path, *, check: bool) -> list[str]:
    stale: list[str] = []
    for name, (source, draw) in PLOTS.items():
        if not (results / source).is_file():
            continue
        drawn = draw((results / source).read_text(encoding="utf-8"))
        plot = results / name
        if not plot.is_file() or plot.read_text(encoding="utf-8") != drawn:
            stale.append(f"{RESULTS}/{name}")
            if not check:
                plot.write_text(drawn, encoding="utf-8")
    return stale


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Find the command; its exit code is 1 where a check found a page that is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m tools.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page is stale")
    check = parser.parse_args(arguments).check
    try:
        changed = update(root, check=check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if check and changed:
        print(f"Not up to date: {', '.join(changed)}. Run `python -m tools.readme`.", file=sys.stderr)
        return 1
    print("\n".join(f"filled {name}" for name in changed) or "All pages are up to date.")
    return 0


def _draw(name: str, results: Path) -> str:
    file, draw = TABLES[name]
    path = results / file
    if not path.is_file():
        return NOT_MEASURED
    try:
        return draw(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{file} is not what it should be: {error}") from error


def _total(seconds: Mapping[str, float]) -> float:
    return seconds.get("total", sum(seconds.values()))


if __name__ == "__main__":
    sys.exit(main())
