"""The paper's protocol as one command: fine-tune, repair with every method, measure, compare."""

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deltaguard.device import device_name
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Question
from deltaguard.files import ANY_OBJECT, expanded, read_json
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.durable import write_atomically
from deltaguard.models.results import BENCH, SETTINGS_NAME, results_folder
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport, Cell
from deltaguard.studies.cells import content_key
from deltaguard.studies.data import Attacks, usable_attacks
from deltaguard.studies.defences import Defence, defences
from deltaguard.studies.describe import finetune_row, notes
from deltaguard.studies.finetune_run import FinetuneRun
from deltaguard.studies.protocol import BOUND, Preset
from deltaguard.studies.score import cells_by_finetune, contests, curves, is_safe, scores
from deltaguard.studies.setting import LIBRARIES, MADE_ONCE, Bench, open_bench

Named = tuple[str, str, float | None]
"""Fine-tune, method and strength of a cell."""


def bench(
    output_dir: str | Path,
    *,
    preset: Preset,
    aligned: str | Path | None = None,
    pretrained: str | Path | None = None,
    methods: Sequence[str] | None = None,
    attacks: Sequence[Question] = (),
    command: str = "",
    progress: Progress | None = None,
) -> BenchReport:
    """Run the protocol of the paper over an aligned model, and compare methods by what they keep.

    Every cell (fine-tune, method, strength, seed) is stored once it is measured. The same call after a kill
    goes on with the first cell that is missing, and gives the same table; with more methods, seeds or probes
    it adds their cells.

    Args:
        output_dir: receives `bench.json`, the cells, and while it runs the models.
        preset: how much is run.
        aligned: the aligned model; the demo's where absent.
        pretrained: the model it was aligned from, for the methods that need it. Without one, and with
            `aligned` given, they are left out.
        methods: names out of `defences()`; all where absent.
        attacks: a user's harmful requests, asked first, and deltaguard's own fill up; those that deltaguard
            has, or trains or calibrates on, are left out (see `data.usable_attacks`).
        command: what the report says the run was started by.
        progress: told of fine-tunes and cells.

    Returns:
        The report, in the folder too.

    Raises:
        DeltaguardError: the folder holds a bench with other settings or something else, is a model's, or
            another process works in it; a method is unknown, or a model cannot be used.
    """
    folder = expanded(output_dir)
    with opened(
        folder,
        preset,
        tuple(defences()) if methods is None else methods,
        aligned=aligned,
        pretrained=pretrained,
        attacks=attacks,
        progress=progress or ignore,
    ) as (setting, settings):
        report = _report(setting, settings, command, *_cells(setting))
        write_atomically(folder / BENCH_NAME, report.model_dump_json(indent=1) + "\n")
    return report


@contextmanager
def opened(
    folder: Path,
    preset: Preset,
    methods: Sequence[str],
    *,
    aligned: str | Path | None,
    pretrained: str | Path | None,
    attacks: Sequence[Question],
    progress: Progress,
) -> Generator[tuple[Bench, dict[str, Any]]]:
    """Open a folder for a bench, or that of an earlier run of the same; other processes are kept out of it.

    Args:
        folder: as in `bench`, like `preset`, `aligned`, `pretrained` and `attacks`.
        preset: how much is run.
        methods: names out of `defences()`.
        aligned: the aligned model.
        pretrained: the model it was aligned from.
        attacks: a user's harmful requests.
        progress: told of what is made.

    Yields:
        What all cells share, and the settings for the report.

    Raises:
        DeltaguardError: as `bench`.
    """
    _check_inputs(methods, aligned, pretrained)
    inputs = [model for model in (aligned, pretrained) if model is not None]
    with results_folder(folder, BENCH, inputs=inputs):
        usable = usable_attacks(attacks, preset)
        settings = _settings(preset, aligned, pretrained, methods, usable)
        _require_same(folder / SETTINGS_NAME, _lasting(settings), "settings")
        setting = open_bench(
            folder,
            preset,
            methods,
            aligned=aligned,
            pretrained=pretrained,
            attacks=usable,
            progress=progress,
        )
        _require_same(folder / "origin.json", setting.origin, "models, prompts, code or libraries")
        yield setting, settings


def _cells(setting: Bench) -> tuple[tuple[Cell, ...], set[Named]]:
    """Every cell of the protocol, and which are defaults alone; models go when their cells are done."""
    found: list[Cell] = []
    beside: set[Named] = set()
    finetunes = setting.preset.finetunes
    for done, finetune in enumerate(finetunes, start=1):
        rows = [FinetuneRun(setting, finetune, seed) for seed in setting.preset.seeds]
        chosen = setting.methods_on(finetune)
        most = len(rows) * (2 + sum(map(setting.most_strengths, chosen)))
        for number, (cell, searched) in enumerate(_finetune_cells(setting, rows, chosen), start=1):
            found.append(cell)
            if not searched:
                beside.add((cell.finetune, cell.method, cell.strength))
            setting.progress(Event(finetune.name, number, most))
        for row in rows:
            row.tidy()
        setting.progress(Event("fine-tunes", done, len(finetunes)))
    return tuple(found), beside


def _finetune_cells(
    setting: Bench, rows: Sequence[FinetuneRun], chosen: Sequence[Defence]
) -> Iterator[tuple[Cell, bool]]:
    """Find the aligned and the fine-tuned model, then every method at its strengths, each for all seeds.

    Yields:
        A cell, and whether it belongs to the search: a default that this passed by is measured after it.
    """
    aligned = {row.seed: row.aligned() for row in rows}
    for cell in (*aligned.values(), *(row.finetuned() for row in rows)):
        yield cell, True
    for method in chosen:
        tried: set[float | None] = set()
        for cell in measured_strengths(
            method.ladder,
            setting.preset.probes,
            is_safe=lambda cells: is_safe(cells, aligned, bound=BOUND),
            cells_at=lambda strength, method=method: [row.restored(method, strength) for row in rows],
        ):
            tried.add(cell.strength)
            yield cell, True
        if method.default is not None and method.default not in tried:
            for row in rows:
                yield row.restored(method, method.default), False


def measured_strengths(
    ladder: Sequence[float],
    probes: int | None,
    *,
    is_safe: Callable[[Sequence[Cell]], bool],
    cells_at: Callable[[float], Sequence[Cell]],
) -> Iterator[Cell]:
    """Measure a method at every rung of its ladder, or look for the largest rung that is safe.

    The search halves the rungs: a safe one leads to those that keep more, an unsafe one to those that keep
    less. Where attack success rises with strength, it ends at the largest safe rung.

    Args:
        ladder: strengths, rising.
        probes: how many strengths at most; `None` measures all.
        is_safe: judges the cells of one strength.
        cells_at: measures a strength, for every seed.

    Yields:
        The cells, in the order measured.
    """
    if probes is None:
        for strength in ladder:
            yield from cells_at(strength)
        return
    low, high = 0, len(ladder)
    for _ in range(probes):
        if low == high:
            return
        middle = (low + high) // 2
        cells = cells_at(ladder[middle])
        yield from cells
        low, high = (middle + 1, high) if is_safe(cells) else (low, middle)


def _report(
    setting: Bench, settings: dict[str, Any], command: str, cells: tuple[Cell, ...], beside: Collection[Named]
) -> BenchReport:
    finetunes = tuple(finetune_row(finetune) for finetune in setting.preset.finetunes)
    found = cells_by_finetune(finetunes, cells)
    points = curves(found, bound=BOUND, beside=beside)
    judged = scores(found, points)
    passed = tuple((point.finetune, point.method, point.strength) for point in points if point.beside)
    return BenchReport(
        environment=environment(device_name(), libraries=LIBRARIES),
        preset=setting.preset.name,
        settings=settings,
        aligned=settings["aligned"] or "the demo's aligned model",
        command=command,
        bound=BOUND,
        seeds=setting.preset.seeds,
        finetunes=finetunes,
        cells=cells,
        curves=points,
        scores=judged,
        contests=contests(found, judged),
        notes=notes(setting, cells, passed),
        seconds=spent(setting, [cell.seconds for cell in cells]),
    )


def spent(setting: Bench, of_cells: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum up the time of all runs in a folder, by stage and in total; a fine-tune's is that of its cell.

    Args:
        setting: knows what is made once.
        of_cells: seconds of every cell.
    """
    made = setting.shelf.seconds()
    seconds = {name: made[name] for name in MADE_ONCE if name in made}
    seconds |= {name: sum(each[name] for each in of_cells) for name in ("request", "measure")}
    return seconds | {"total": sum(seconds.values())}


def _settings(
    preset: Preset,
    aligned: str | Path | None,
    pretrained: str | Path | None,
    methods: Sequence[str],
    attacks: Attacks,
) -> dict[str, Any]:
    return {
        "preset": TypeAdapter(Preset).dump_python(preset, mode="json"),
        "aligned": None if aligned is None else str(aligned),
        "pretrained": None if pretrained is None else str(pretrained),
        "methods": list(methods),
        "attacks": content_key(attacks.questions) if attacks.questions else None,
    }


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Find the settings that a folder's runs must share.

    More methods, strengths or seeds are more cells of the same bench, and models are told by their weights
    (see `Bench.origin`), whatever path leads to them.
    """
    preset = {name: value for name, value in settings["preset"].items() if name not in ("probes", "seeds")}
    return {"preset": preset, "attacks": settings["attacks"]}


def _require_same(path: Path, values: Mapping[str, Any], what: str) -> None:
    """Write down what a folder belongs to, or compare it with that of the run before."""
    if not path.is_file():
        write_atomically(path, json.dumps(values, indent=1) + "\n")
        return
    known = read_json(path, ANY_OBJECT, remedy="Give another output folder.")
    differing = sorted(name for name in values if values[name] != known.get(name))
    if differing:
        raise DeltaguardError(
            f"{path.parent} holds a bench with other {what} ({', '.join(differing)} differ). Go on with what "
            "that run had, or give another output folder."
        )


def _check_inputs(methods: Sequence[str], aligned: str | Path | None, pretrained: str | Path | None) -> None:
    unknown = [name for name in methods if name not in defences()]
    if unknown or not methods:
        named = f"There is no method {', '.join(unknown)}" if unknown else "No method was chosen"
        raise DeltaguardError(f"{named}. The methods are {', '.join(defences())}.")
    for model in (aligned, pretrained):
        if model is not None:
            Checkpoint.open(model)
