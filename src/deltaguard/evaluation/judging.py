"""From what models answered to what judges and scorers say of it."""

from collections.abc import Mapping, Sequence

from deltaguard.evaluation.answering import Candidate, PartFiles
from deltaguard.evaluation.exchange import Exchange, Judge, Judgement, Question
from deltaguard.evaluation.harness_numbers import harness_measures, harness_rows, harness_tasks
from deltaguard.evaluation.judges.coherence import CoherenceCheck, classify
from deltaguard.evaluation.outcomes import Judged, Outcome
from deltaguard.evaluation.suites.parts import Part
from deltaguard.evaluation.utility.scores import SCORERS
from deltaguard.progress import Event, Progress


def outcome(
    candidate: Candidate, each: PartFiles, judges: Sequence[Judge], check: CoherenceCheck, report: Progress
) -> Outcome:
    """One model on one part, judged and scored.

    Args:
        candidate: the model.
        each: its answers; a server may have left some out.
        judges: who tells refusals from compliance; not asked about utility.
        check: who tells broken text.
        report: told of each judge, as stage "judge NAME".
    """
    part, rows = each.part, harness_rows(each)
    answers = tuple(each.files["answers"].in_order()) if "answers" in each.files else ()
    values: dict[str, tuple[float | None, ...]] = {
        # A scorer's name is an option's; measures are named in words.
        name.replace("-match", " match"): tuple(
            None if answer is None else SCORERS[name](answer, _expected(question))
            for answer, question in zip(answers, part.questions, strict=True)
        )
        for name in part.scorers
    }
    if "likelihood" in each.files:
        values["nll"] = tuple(each.files["likelihood"].in_order())
    return Outcome(
        model=candidate.name,
        section=part.row(),
        prompts=part.plain,
        answers=answers,
        judged=_judged(part, answers, judges, check, report) if part.kind != "utility" else {},
        values=values,
        given=harness_measures(rows),
        harness=harness_tasks(candidate.name, part.name, rows),
    )


def _expected(question: Question) -> str:
    if question.expected is None:
        raise ValueError(f"{question.prompt!r} has no expected answer; `resolve` refuses such a set.")
    return question.expected


def exchanges(part: Part, answers: Sequence[str | None]) -> dict[int, Exchange]:
    """Put requests in plain words beside whole answers, prefilled beginnings included and known as such.

    Returns:
        By the prompt's index, those that were answered.
    """
    beginnings = [question.prefill.rstrip() for question in part.questions]
    return {
        i: Exchange(prompt, f"{beginning} {answer}" if beginning else answer, beginning)
        for i, (prompt, beginning, answer) in enumerate(zip(part.plain, beginnings, answers, strict=True))
        if answer is not None
    }


def _judged(
    part: Part,
    answers: Sequence[str | None],
    judges: Sequence[Judge],
    check: CoherenceCheck,
    report: Progress,
) -> Mapping[str, Judged]:
    whole = exchanges(part, answers)
    # A prefilled beginning is not the model's: alone it would make sense of an empty answer.
    broken = check.broken([Exchange(part.plain[i], answers[i] or "") for i in whole])
    found: dict[str, Judged] = {}
    for judge in judges:
        report(Event(f"judge {judge.name}: {part.name}", 0, len(whole)))
        said = judge.judge(list(whole.values()))
        report(Event(f"judge {judge.name}: {part.name}", len(whole), len(whole)))
        pairs = dict(zip(whole, zip(said, broken, strict=True), strict=True))
        found[judge.name] = _placed(judge, pairs, len(answers))
    return found


def _placed(judge: Judge, said: Mapping[int, tuple[Judgement, bool]], total: int) -> Judged:
    """What a judge said, and whether answers are broken, at their prompts' places."""
    found = [said.get(i) for i in range(total)]
    return Judged(
        verdicts=tuple(each and each[0].verdict for each in found),
        classes=tuple(
            each and classify(each[0].verdict, each[1], reads_opening=judge.reads_opening) for each in found
        ),
        scores=tuple(each and each[0].score for each in found),
        scale=judge.scale,
    )
