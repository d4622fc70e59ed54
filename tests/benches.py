"""A bench small enough for tests."""

from dataclasses import replace

from deltaguard.curvature.request import CalibrateConfig
from deltaguard.evaluation.results import Judged, Result
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.studies.protocol import FULL, QUICK, Answers, Finetune


def results(parts, *, attack="complied", harmless="refused", loss=1.0):
    """What measuring a model of a bench would give, were all answers of a kind alike."""

    def result(part):
        size = len(part.questions)
        classes = ({"attack": attack, "harmless": harmless}.get(part.kind),) * size
        judged = {} if part.kind == "utility" else {"opening": Judged(classes, classes, (None,) * size)}
        values = {} if judged else {"nll": tuple(loss + i for i in range(size))}
        return Result("m", part.row(), part.plain, (), judged, values, {})

    return {part.name: result(part) for part in parts}


RECIPE = FinetuneConfig(learning_rate=1e-3, max_steps=2)
LORA = FinetuneConfig(learning_rate=1e-3, max_steps=2, lora_rank=2)
TINY = replace(
    QUICK,
    finetunes=(Finetune("identity", 0, 4, "full", RECIPE),),
    attack=4,
    harmless=3,
    utility=3,
    general=2,
    answers=Answers(safety=4, task=4, dtype="auto"),
    retrained=FULL.retrained,
    calibration=CalibrateConfig(num_samples=4, num_held_out=8, max_new_tokens=4, device="cpu"),
)


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def without_times(report):
    """A report but for how long it took."""
    measured = [cell.model_copy(update={"seconds": {}}) for cell in report.cells]
    scores = [score.model_copy(update={"request_seconds": None}) for score in report.scores]
    return measured, report.curves, scores, report.contests, report.finetunes, report.notes
