"""`deltaguard bench`."""

import shlex
import sys
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from deltaguard.cli.sink import (
    Json,
    OptionalInt,
    Output,
    Reference,
    Seed,
    UsageError,
    emit,
    hide_bars_of_transformers,
    progress_bar,
    tell,
)

_DURATIONS = {
    "quick": "The quick preset takes up to 80 minutes on a CPU core; it can be interrupted at any time.",
    "full": "The full preset is for a GPU, and takes long on one, too; it can be interrupted at any time.",
    "attacks": "The preset of attackers takes hours on two CPU cores; it can be interrupted at any time.",
    "default": "This preset takes hours on two CPU cores; it can be interrupted at any time.",
}


def bench(
    aligned: Reference | None = None,
    /,
    *,
    output: Output,
    preset: Literal["quick", "full", "attacks", "default"] = "quick",
    pretrained: Reference | None = None,
    method: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    finetune: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    seeds: Annotated[OptionalInt, Parameter(validator=validators.Number(gte=1))] = None,
    first_seed: Seed | None = None,
    probes: Annotated[OptionalInt, Parameter(validator=validators.Number(gte=1))] = None,
    training: Literal["full", "lora"] | None = None,
    attack_prompts: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    json: Json = False,
) -> None:
    """Compare methods by the paper's protocol: fine-tunes that undo refusals, repaired at several strengths.

    A run that was interrupted goes on when the same command is given again.

    Args:
        aligned: The aligned model: a folder, a Hub id, or `id@revision`; the demo's where absent.
        output: The folder for results and, while it runs, models.
        preset: `quick`, for two CPU cores; `full`, for a GPU; `default`: the same fine-tunes, each checked,
            and restored with default options; or `attacks`: fine-tunes of attackers, likewise.
        pretrained: The model that the aligned one was made from; Safe LoRA and SafeMERGE need it.
        method: Compare this method; may be repeated. `kfac`, `ridge`, `greedy`, `greedy-none`, `published`,
            `wise-ft`, `resta`, `safe-lora`, `safe-merge`, `one-shot`, `safe-instruct`, `bea`; all where
            absent. With default options a strength may stand behind it, and must where it has none of its
            own, such as `published=0.3`; `kfac` where absent.
        finetune: Make this fine-tune of the preset alone, by the name that tables give it; may be repeated.
        seeds: Train every fine-tune with so many seeds; 1 in the quick preset, 3 in the others.
        first_seed: The first of these seeds; what was chosen with some is to be measured with others. Where
            absent, 3 in the default and the attacks preset, and 0 in the others.
        probes: Measure so many of a method's seven strengths at most, found by bisection; 2 in the quick
            preset, all in the full one. Default limits are measured beside them.
        training: Fine-tune all weights (`full`), or LoRA adapters (`lora`); where absent, both in the full
            and the default preset, and all weights in the others.
        attack_prompts: A data set or file of harmful prompts, asked first; deltaguard's own fill up to as
            many as the preset asks. May be repeated.
        json: Print one JSON document and nothing else on stdout.
    """
    if pretrained is not None and aligned is None:
        raise UsageError("--pretrained belongs to an aligned model: give that, too.")
    if probes is not None and preset in ("attacks", "default"):
        raise UsageError(f"--probes is of no use with --preset {preset}: it measures each method once.")
    from deltaguard.evaluation.datasets.load import load_questions
    from deltaguard.reports.attacks import attacks_table
    from deltaguard.reports.bench import bench_table
    from deltaguard.reports.records.attacks import AttacksReport
    from deltaguard.studies.attack_study import bench_attacks
    from deltaguard.studies.defences import defences
    from deltaguard.studies.protocol import PRESETS
    from deltaguard.studies.run import bench as run_bench

    chosen = PRESETS[preset].with_changes(
        finetunes=finetune, seeds=seeds, first_seed=first_seed, probes=probes, training=training
    )
    named = [name.partition("=")[0] if chosen.by_default else name for name in method]
    if unknown := [name for name in named if name not in defences()]:
        raise UsageError(f"There is no method {', '.join(unknown)}. The methods are {', '.join(defences())}.")
    attacks = [question for name in attack_prompts for question in load_questions(name)]
    tell(_DURATIONS[preset])
    hide_bars_of_transformers()
    run = bench_attacks if chosen.by_default else run_bench
    with progress_bar() as progress:
        report = run(
            output,
            preset=chosen,
            aligned=aligned,
            pretrained=pretrained,
            methods=method or None,
            attacks=attacks,
            command=shlex.join(["deltaguard", *sys.argv[1:]]),
            progress=progress,
        )
    drawn = attacks_table(report) if isinstance(report, AttacksReport) else bench_table(report)
    emit(report, drawn, as_json=json, last=f"Results: {output}")
