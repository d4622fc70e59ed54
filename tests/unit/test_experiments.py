"""The table of experiments shows what was measured."""

from tools.experiments import ExperimentRow, Experiments, Share, experiments_table

from deltaguard.reports.records.base import environment


def row(experiment, variant, lead=None):
    share = Share(value=0.5, low=0.25, high=0.75, total=4)
    return ExperimentRow(
        experiment=experiment,
        variant=variant,
        safety_kl=1e-3,
        predicted_kl=None,
        attack_success=share,
        task_accuracy=None,
        kept=share,
        lead=lead,
        seconds=1.0,
        attack="rrcc",
        nll=(1.0, 2.0),
    )


def test_the_table_names_an_experiment_once_and_shows_its_variants():
    lead = Share(value=-0.01, low=-0.02, high=0.03, total=2)
    found = Experiments(
        environment=environment("cpu"),
        finetune="task, seed 0",
        conversations=8,
        held_out=4,
        slack=0.02,
        origin="0",
        references=(row("", "aligned"), row("", "fine-tuned")),
        rows=(row("labels", "drawn"), row("labels", "own", lead)),
    )
    lines = [line for line in experiments_table(found.model_dump_json()).splitlines() if line[:1] == "|"]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [cells[0] for cells in shown] == ["aligned", "fine-tuned", "labels", ""]
    assert shown[3][1:4] == ["own", "0.001", "–"]
    assert shown[3][4] == "50.0 %<br>(25.0–75.0 %)"
    assert shown[3][-1] == "-1.0<br>(-2.0 to +3.0)"
