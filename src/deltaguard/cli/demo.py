"""`deltaguard demo`."""

from pathlib import Path

from deltaguard.cli.sink import Json, Output, Seed, emit, hide_bars_of_transformers, progress_bar, tell


def demo(
    *,
    output: Output = Path("demo"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show the whole story on SmolLM2-135M: align, fine-tune, calibrate, restore, measure, report.

    Args:
        output: A new folder for the models, the curvature and `report.html`.
        seed: Of the task, the mixtures and both fine-tunes.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.cli.report import page_line
    from deltaguard.reports.demo import demo_table
    from deltaguard.studies.demo import DemoConfig
    from deltaguard.studies.demo import demo as run

    tell("The demo takes six to fifteen minutes on two CPU cores; nothing is downloaded.")
    hide_bars_of_transformers()
    with progress_bar() as progress:
        report = run(output, config=DemoConfig(seed=seed), progress=progress)
    emit(report, demo_table(report), as_json=json, last=page_line(output))
