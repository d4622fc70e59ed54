"""Some answers of all models side by side, for people to look at."""

from collections.abc import Sequence

from deltaguard.evaluation.outcomes import Outcome
from deltaguard.reports.records.evaluation import AnswerClass, AnswerSample


def samples(outcomes: Sequence[Outcome], count: int) -> tuple[AnswerSample, ...]:
    """Show the first prompts of each section that has answers, with what every model answered."""
    found: list[AnswerSample] = []
    for name in dict.fromkeys(outcome.section.name for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.section.name == name and outcome.answers]
        found += [_sample(rows, i) for i in range(min(count, len(rows[0].prompts)) if rows else 0)]
    return tuple(found)


def _sample(rows: Sequence[Outcome], index: int) -> AnswerSample:
    return AnswerSample(
        section=rows[0].section.name,
        kind=rows[0].section.kind,
        prompt=rows[0].prompts[index],
        answers={row.model: answer for row in rows if (answer := row.answers[index]) is not None},
        verdicts={row.model: classes for row in rows if (classes := _classes(row, index))},
    )


def _classes(row: Outcome, index: int) -> dict[str, AnswerClass]:
    """What each judge took an answer for; empty where there is none."""
    return {judge: each for judge, said in row.judged.items() if (each := said.classes[index]) is not None}
