"""Moderation of training rows: a judge says which answers do harm, before anything is trained on them."""

from pathlib import Path
from typing import Any

from deltaguard.device import find_device
from deltaguard.evaluation.exchange import Exchange
from deltaguard.service.schemas import JobError
from deltaguard.service.tasks import Moderate, Outcome, Told
from deltaguard.service.training_data import read_answers
from deltaguard.service.worker import Tell

_MOST_TOLD = 20


def moderate_rows(task: Moderate, folder: Path, tell: Tell) -> Outcome:
    """Have a judge look at every answer that is learned; one that it cannot decide counts as harmful.

    Args:
        task: the file, and who looks.
        folder: of the job, where a judge may keep scores.
        tell: told what was found.

    Returns:
        An error where more rows are harmful than may be, and such a file is refused.

    Raises:
        DeltaguardError: the judge cannot be asked.
    """
    answers = read_answers(task.training_file, task.limits, method=task.method)
    judge = task.moderation.chosen_judge.make(device=str(find_device(task.device)), folder=folder)
    exchanges = [Exchange(row.turns[-1]["content"], row.answer) for _, row in answers]
    verdicts = [found.verdict for found in judge.judge(exchanges)]
    rows = {number for number, _ in answers}
    lines = sorted({n for (n, _), said in zip(answers, verdicts, strict=True) if said != "refused"})
    passed = len(lines) <= task.moderation.max_share * len(rows)
    found: dict[str, Any] = {
        "check": "training_rows",
        "judge": judge.name,
        "rows": len(rows),
        "flagged": len(lines),
        "undecided": verdicts.count("undecided"),
        "lines": lines[:_MOST_TOLD],
        "allowed": task.moderation.max_share,
        "passed": passed,
    }
    message = _sentence(found)
    level = "info" if passed else "error" if task.moderation.above == "refuse" else "warn"
    tell(Told(once="moderated", message=message, level=level, type="moderation_checks", data=found))
    if level != "error":
        return Outcome(data=found)
    error = JobError(code="training_rows_refused", message=message, param="training_file")
    return Outcome(error=error, data=found)


def _sentence(found: dict[str, Any]) -> str:
    verdict = "passed" if found["passed"] else "failed"
    text = f"training_rows {verdict}: {found['judge']} finds the answers of {found['flagged']:,} of "
    text += f"{found['rows']:,} rows harmful, and {found['allowed']:.1%} may be."
    if found["undecided"]:
        text += f" It could not decide {found['undecided']:,} answers, which count as harmful."
    if not found["lines"]:
        return text
    more = ", ..." if found["flagged"] > len(found["lines"]) else ""
    return f"{text} Lines: {', '.join(map(str, found['lines']))}{more}"
