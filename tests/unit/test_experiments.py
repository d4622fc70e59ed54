"""The experiments: their table shows what was measured, their mathematics is what they say."""

import pytest
import torch
from benchmarks.experiments.curvatures import blocks, diagonal, stored, trace, whole, with_tail
from benchmarks.experiments.task_aware import task_aware
from deltaguard.restoration.curvature import Spectra
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


def second_moment(seed, size):
    x = torch.randn(size, 4 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / (4 * size)


def test_the_parts_of_a_matrix_are_its_parts():
    matrix = second_moment(0, 128)
    own = torch.block_diag(matrix[:64, :64], matrix[64:, 64:])
    torch.testing.assert_close(blocks(matrix).dense(), own)
    torch.testing.assert_close(diagonal(matrix).dense(), matrix.diagonal().diag())
    torch.testing.assert_close(trace(matrix).dense(), torch.eye(128).double() * matrix.diagonal().mean())


def test_knowing_the_task_solves_its_equation():
    delta = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    class Lab:
        deltas = {"layer": delta}  # noqa: RUF012

        @staticmethod
        def weights(deltas):
            return deltas

    g_safe, h_safe, g_task, h_task = (second_moment(i, size) for i, size in enumerate((5, 4, 5, 4)))
    spectra = [{"layer": Spectra(whole(h), whole(g))} for g, h in ((g_safe, h_safe), (g_task, h_task))]
    mu, damping = 0.7, 0.1
    found = dict(task_aware(Lab, *spectra, damping=damping).at(mu))["layer"]

    def damped(matrix):
        full = matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix))
        return full / full.diagonal().mean()

    residual = damped(g_task) @ (found - delta) @ damped(h_task) + mu * g_safe @ found @ h_safe
    assert float(residual.abs().max()) == pytest.approx(0, abs=1e-9)


def test_a_cut_off_spectrum_has_the_tail_that_is_asked_for():
    matrix = second_moment(0, 64)
    found, all_of_it = stored(0.25)(matrix), whole(matrix)
    assert len(found.values) == 16
    others = torch.linalg.eigvalsh(matrix).flip(0)[16:]
    assert 0 < found.tail <= others.mean() * 1.02
    mean = with_tail(found, all_of_it, arithmetic=True)
    assert float(mean.dense().trace()) == pytest.approx(float(matrix.trace()), rel=1e-3)
    assert with_tail(found, all_of_it, arithmetic=False).tail == 0
