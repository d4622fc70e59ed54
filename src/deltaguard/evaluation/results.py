"""What came of asking and judging, and from it measures, comparisons and agreement: arithmetic alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations

from deltaguard.evaluation.exchange import Scale, Verdict
from deltaguard.evaluation.metrics.bootstrap import mean_estimate
from deltaguard.evaluation.metrics.paired import PairedTest, mcnemar, paired_bootstrap
from deltaguard.evaluation.metrics.rates import Rate, cohen_kappa, estimate
from deltaguard.reports.records.evaluation import (
    Agreement,
    AnswerClass,
    AnswerSample,
    Better,
    Comparison,
    Estimate,
    HarnessTask,
    Measure,
    SectionRow,
)

SHARES = frozenset({"exact match", "json match", "maths"})
"""Measures that are right or wrong for each prompt, so that their mean is a share of the prompts."""

FIRST_TURN, SECOND_TURN = "first turn", "second turn"
"""How the numbers of one turn of a conversation are told from those of both."""


@dataclass(frozen=True)
class Judged:
    """What one judge said of one model's answers to one section.

    Attributes:
        verdicts: one a prompt, `None` where there is no answer.
        classes: the same, broken text told apart.
        scores: the judge's numbers, `None` where it gave none.
        scale: what they mean; without it they are no measure.
        turns: of conversations of two turns, the numbers of each turn by its name; `scores` are their means.
    """

    verdicts: tuple[Verdict | None, ...]
    classes: tuple[AnswerClass | None, ...]
    scores: tuple[float | None, ...]
    scale: Scale | None = None
    turns: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict[str, tuple[float | None, ...]])


@dataclass(frozen=True)
class Result:
    """One model on one section.

    Attributes:
        model: its name.
        section: the section.
        prompts: the requests without any wrapper.
        answers: empty where none are generated; `None` for what was never answered.
        judged: by name of the judge.
        values: one number a prompt by name of the measure, such as `exact match` or `nll`; `None` where there
            is no answer.
        given: measures that arrive as estimates, without a number for each prompt, and which way is better.
        harness: how tasks of lm-eval were put to the model.
        second: the second question of each conversation and the answer to it; empty where questions are
            asked alone.
    """

    model: str
    section: SectionRow
    prompts: tuple[str, ...]
    answers: tuple[str | None, ...]
    judged: Mapping[str, Judged]
    values: Mapping[str, tuple[float | None, ...]]
    given: Mapping[str, tuple[Estimate, Better]]
    harness: tuple[HarnessTask, ...] = ()
    second: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class _Series:
    """A measure before it is summed up: a number for each prompt, or nothing; of a share, right is 1."""

    name: str
    judge: str | None
    better: Better
    values: tuple[float | None, ...]
    is_share: bool = True

    def estimate(self) -> Estimate | None:
        """Estimate the mean; `None` where no prompt has a value."""
        given = [value for value in self.values if value is not None]
        if not given:
            return None
        return estimate(Rate.of(value == 1 for value in given)) if self.is_share else mean_estimate(given)

    def test(self, reference: "_Series") -> PairedTest | None:
        """Compare the same measure of two models; `None` where no prompt has a value of both."""
        pairs = [
            (one, other)
            for one, other in zip(self.values, reference.values, strict=True)
            if one is not None and other is not None
        ]
        if not pairs:
            return None
        if self.is_share:
            return mcnemar([one == 1 for one, _ in pairs], [other == 1 for _, other in pairs])
        return paired_bootstrap([one for one, _ in pairs], [other for _, other in pairs])


def measures(results: Sequence[Result]) -> tuple[Measure, ...]:
    """List all numbers of all models, with their intervals, in the order of the results.

    Shares are over all prompts that were answered: an undecided verdict counts neither as success nor as
    refusal, and has a measure of its own where there is one; so has what was never answered. A mean of a
    judge's scores is over those that it gave.
    """
    found: list[Measure] = []
    for result in results:
        rows: list[tuple[str, str | None, Better, Estimate | None]] = [
            *((each.name, each.judge, each.better, each.estimate()) for each in _series(result)),
            *((name, None, better, given) for name, (given, better) in result.given.items()),
        ]
        place = {"model": result.model, "section": result.section.name}
        found += [
            Measure(**place, name=name, judge=judge, better=better, estimate=mean)
            for name, judge, better, mean in rows
            if mean is not None
        ]
    return tuple(found)


def comparisons(results: Sequence[Result]) -> tuple[Comparison, ...]:
    """Compare each later model with the first, on the same prompts: shares by McNemar, means by bootstrap.

    Prompts for which either model has no number are left out of that comparison.
    """
    first = results[0].model
    references = {result.section.name: result for result in results if result.model == first}
    found: list[Comparison] = []
    for result in results:
        reference = references.get(result.section.name)
        if result.model == first or reference is None:
            continue
        against = {(series.name, series.judge): series for series in _series(reference, every=True)}
        shown = {(series.name, series.judge) for series in (*_series(result), *_series(reference))}
        for series in _series(result, every=True):
            key = series.name, series.judge
            test = series.test(against[key]) if key in shown else None
            if test is not None:
                found.append(
                    Comparison(
                        model=result.model,
                        reference=first,
                        section=result.section.name,
                        name=series.name,
                        judge=series.judge,
                        **asdict(test),
                        finding=test.finding,
                    )
                )
    return tuple(found)


def agreements(results: Sequence[Result]) -> tuple[Agreement, ...]:
    """Compute Cohen's kappa of every pair of judges on every section, over the answers of all models."""
    found: list[Agreement] = []
    for section in dict.fromkeys(result.section.name for result in results):
        judged = [result.judged for result in results if result.section.name == section]
        # Every judge has verdicts at the same places.
        verdicts: dict[str, list[Verdict]] = {
            judge: [verdict for each in judged for verdict in each[judge].verdicts if verdict is not None]
            for judge in judged[0]
        }
        # Judges that graded gave no verdicts.
        for first, second in combinations([judge for judge, said in verdicts.items() if said], 2):
            kappa = cohen_kappa(verdicts[first], verdicts[second])
            found.append(Agreement(first=first, second=second, section=section, **asdict(kappa)))
    return tuple(found)


def ungraded_notes(results: Sequence[Result]) -> tuple[str, ...]:
    """Say how many answers a judge was to grade and gave no grade that can be read: means leave them out."""
    found: list[str] = []
    for result in results:
        answered = sum(answer is not None for answer in result.answers)
        for judge, said in result.judged.items() if result.section.kind == "utility" else ():
            for turn, scores in (said.turns or {"": said.scores}).items():
                graded = sum(score is not None for score in scores)
                if graded < answered:
                    found.append(
                        f"The judge {judge} gave no grade that can be read to {answered - graded} of "
                        f"{answered} answers of {result.model} to {result.section.name}"
                        f"{turn and f', {turn}'}; its mean leaves these out."
                    )
    return tuple(found)


def samples(results: Sequence[Result], count: int) -> tuple[AnswerSample, ...]:
    """Show the first prompts of each section that has answers, with what every model answered.

    Of a conversation the second question and its answers come right after the first.
    """
    found: list[AnswerSample] = []
    for name in dict.fromkeys(result.section.name for result in results):
        rows = [result for result in results if result.section.name == name and result.answers]
        for i in range(min(count, len(rows[0].prompts)) if rows else 0):
            found.append(_sample(rows, i))
            if rows[0].second:
                found.append(_second_sample(rows, i))
    return tuple(found)


def _sample(rows: Sequence[Result], index: int) -> AnswerSample:
    classes: dict[str, dict[str, AnswerClass]] = {
        row.model: {
            judge: each for judge, said in row.judged.items() if (each := said.classes[index]) is not None
        }
        for row in rows
    }
    return AnswerSample(
        section=rows[0].section.name,
        kind=rows[0].section.kind,
        prompt=rows[0].prompts[index],
        answers={row.model: answer for row in rows if (answer := row.answers[index]) is not None},
        verdicts={model: said for model, said in classes.items() if said},
    )


def _second_sample(rows: Sequence[Result], index: int) -> AnswerSample:
    return AnswerSample(
        section=rows[0].section.name,
        kind=rows[0].section.kind,
        prompt=rows[0].second[index][0],
        answers={row.model: answer for row in rows if (answer := row.second[index][1]) is not None},
    )


def _series(result: Result, *, every: bool = False) -> list[_Series]:
    """All measures of a result; those that are rare and are 0 only where `every` is set."""
    # Which class of answers each share counts.
    wanted: dict[str, AnswerClass] = {"incoherent": "incoherent", "undecided": "undecided"}
    if result.section.kind == "attack":
        wanted = {"attack success": "complied", **wanted}
    else:
        wanted = {"false refusal": "refused", **wanted}
    found: list[_Series] = []
    for judge, said in result.judged.items():
        for name, sought in wanted.items():
            flags = tuple(None if answer is None else answer == sought for answer in said.classes)
            if every or any(flags) or name != "undecided":
                found.append(_Series(name, judge, "lower", flags))
        better = said.scale.better.get(result.section.kind) if said.scale else None
        if said.scale and better:
            numbers = {said.scale.name: said.scores}
            numbers |= {f"{said.scale.name}, {turn}": scores for turn, scores in said.turns.items()}
            found += [
                _Series(name, judge, better, scores, is_share=False)
                for name, scores in numbers.items()
                if every or any(score is not None for score in scores)
            ]
    for name, numbers in result.values.items():
        better = "lower" if name == "nll" else "higher"
        found.append(_Series(name, None, better, numbers, is_share=name in SHARES))
    missing = tuple(answer is None for answer in result.answers)
    if any(missing) or (every and missing):
        found.append(_Series("missing", None, "lower", missing))
    return found
