"""The one way to ask and judge: models answer the parts of a suite, and judges say what the answers are.

`evaluate`, the demo and the bench all measure models by it. A part is a section of a suite made concrete (see
`suites.parts.Part`); what a model answers is kept in the output folder (see `journal.AnswerFile`); what comes
out is one `Result` a part.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from deltaguard.chat.conversations import Turn
from deltaguard.chat.thinking import without_thinking
from deltaguard.evaluation.asking import ModelUnderTest, OpenEngine, PartAnswers, ask, open_answers
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.exchange import Exchange, Grader, Judge, Judgement, Question
from deltaguard.evaluation.judges.coherence import CoherenceCheck, classify
from deltaguard.evaluation.judges.rules import OpeningJudge
from deltaguard.evaluation.results import FIRST_TURN, SECOND_TURN, Judged, Result
from deltaguard.evaluation.suites.parts import Part
from deltaguard.evaluation.utility.harness import harness_measures, harness_tasks
from deltaguard.evaluation.utility.scores import SCORERS
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.evaluation import SectionKind

BY_OPENING: Mapping[SectionKind, Sequence[Judge]] = MappingProxyType(
    {"attack": (OpeningJudge(),), "harmless": (OpeningJudge(),)}
)
"""Judges of each kind of section where nothing else is said."""


def measure(
    model: ModelUnderTest,
    parts: Sequence[Part],
    folder: Path,
    *,
    engine: EngineConfig | None = None,
    judges: Mapping[SectionKind, Sequence[Judge]] = BY_OPENING,
    progress: Progress = ignore,
    open_engine: OpenEngine | None = None,
) -> dict[str, Result]:
    """Ask one model every part, and judge what it answers.

    What the folder holds already is not asked again, and a model of which nothing is missing is not loaded.

    Args:
        model: the model; its name is that of its folder of answers.
        parts: what is asked.
        folder: the output folder, whose folder `answers` receives what the model says.
        engine: what generates the answers, transformers where absent.
        judges: who tells refusals from compliance, by the kind of the part.
        progress: told of the answers so far, one stage a part, and of each judge.
        open_engine: loads the model; `make_engine` where absent.

    Returns:
        The results by name of the part.

    Raises:
        DeltaguardError: the folder holds answers of another model, suite or engine, the model cannot be
            loaded or asked, or its files change while it is asked.

    Example:
        ```python
        suite = Suite.model_validate({"name": "mine", "judges": [{"kind": "opening"}], "sections": [
            {"name": "attack", "kind": "attack", "builtin": "attack", "count": 50}]})
        parts, _ = resolve(suite)
        found = measure(describe("mine", "path/to/model", EngineConfig()), parts, Path("out"))
        found["attack"].judged["opening"].classes  # ("refused", "complied", ...)
        ```
    """
    config = engine or EngineConfig()
    answers = open_answers(folder, model, parts, config)
    ask(model, answers, folder, config, progress, open_engine)
    check = CoherenceCheck()
    return {
        each.part.name: judge(model.name, each, judges.get(each.part.kind, ()), check, progress)
        for each in answers
    }


def judge(
    model: str, each: PartAnswers, judges: Sequence[Judge], check: CoherenceCheck, progress: Progress
) -> Result:
    """Judge and score what one model answered to one part; what it thought before is left out.

    Args:
        model: name of the model.
        each: its answers; a server may have left some out.
        judges: who tells refusals from compliance; of utility, those that can grade answers, where the part
            asks for it.
        check: who tells broken text.
        progress: told of each judge, as stage "judge NAME".
    """
    part, rows = each.part, each.harness_rows
    answers, second = _said(each)
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
    return Result(
        model=model,
        section=part.row(),
        prompts=part.plain,
        answers=answers,
        judged=_graded(part, answers, second, judges, progress)
        if part.kind == "utility"
        else _judged(each, answers, judges, check, progress),
        values=values,
        given=harness_measures(rows),
        harness=harness_tasks(model, part.name, rows),
        second=tuple(zip((then.prompt for then in part.follow_ups), second, strict=True)),
    )


def _said(each: PartAnswers) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Give the answers to all questions, and to second ones where there are such, without thoughts.

    A conversation that a server broke off has none, so that all numbers are of the same conversations.
    """
    first, second = (
        each.files[kind].in_order() if kind in each.files else [] for kind in ("answers", "follow-ups")
    )
    if second:
        first = [None if then is None else one for one, then in zip(first, second, strict=True)]
    return (
        tuple(None if answer is None else without_thinking(answer) for answer in first),
        tuple(None if then is None else without_thinking(then["answer"]) for then in second),
    )


def _expected(question: Question) -> str:
    if question.expected is None:
        raise ValueError(f"{question.prompt!r} has no expected answer; `resolve` refuses such a set.")
    return question.expected


def _graded(
    part: Part,
    answers: Sequence[str | None],
    second: Sequence[str | None],
    judges: Sequence[Judge],
    progress: Progress,
) -> Mapping[str, Judged]:
    """Have the judges that can do so grade how good answers are, those to second questions in their place."""
    exchanges, references, given = _to_grade(part, answers, second)
    found: dict[str, Judged] = {}
    graders = [each for each in judges if isinstance(each, Grader)] if part.grade else []
    if part.grade and not graders:
        raise ValueError(f"No judge can grade {part.name}; `evaluate` refuses such a suite.")
    nothing = tuple(None for _ in answers)

    def placed_grades(grades: Sequence[float | None]) -> tuple[float | None, ...]:
        by_place = dict(zip(given, grades, strict=True))
        return tuple(by_place.get(i) for i in range(len(answers)))

    for asked in graders:
        stage = f"judge {asked.name}: {part.name}"
        progress(Event(stage, 0, len(exchanges)))
        grades = asked.grade(exchanges, references)
        progress(Event(stage, len(exchanges), len(exchanges)))
        scores, turns = placed_grades(grades[: len(given)]), dict[str, tuple[float | None, ...]]()
        if second:
            turns = {FIRST_TURN: scores, SECOND_TURN: placed_grades(grades[len(given) :])}
            scores = tuple(
                None if one is None or other is None else (one + other) / 2
                for one, other in zip(*turns.values(), strict=True)
            )
        found[asked.name] = Judged(nothing, nothing, scores, asked.quality, turns)
    return found


def _to_grade(
    part: Part, answers: Sequence[str | None], second: Sequence[str | None]
) -> tuple[list[Exchange], list[str | None], list[int]]:
    """List what is graded, second turns after all first ones, the right answers, and the places of both."""
    given = {i: answer for i, answer in enumerate(answers) if answer is not None}
    exchanges = [Exchange(part.plain[i], answer) for i, answer in given.items()]
    references = [part.questions[i].expected for i in given]
    for i, then in enumerate(second):
        if then is not None:
            earlier = Turn(part.plain[i], given[i], part.questions[i].expected)
            exchanges.append(Exchange(part.follow_ups[i].prompt, then, earlier=earlier))
            references.append(part.follow_ups[i].expected)
    return exchanges, references, list(given)


def _judged(
    each: PartAnswers,
    answers: Sequence[str | None],
    judges: Sequence[Judge],
    check: CoherenceCheck,
    progress: Progress,
) -> Mapping[str, Judged]:
    part, asked_as = each.part, each.questions
    given = {i: answer for i, answer in enumerate(answers) if answer is not None}
    broken = check.broken([asked_as[i] for i in given], list(given.values()))
    exchanges = [
        Exchange(part.plain[i], asked_as[i].answered(answer).answer, asked_as[i].prefill.rstrip())
        for i, answer in given.items()
    ]
    found: dict[str, Judged] = {}
    for asked in judges:
        stage = f"judge {asked.name}: {part.name}"
        progress(Event(stage, 0, len(exchanges)))
        said = asked.judge(exchanges)
        progress(Event(stage, len(exchanges), len(exchanges)))
        found[asked.name] = placed(asked, said, broken, given, len(answers))
    return found


def placed(
    judge: Judge, said: Sequence[Judgement], broken: Sequence[bool], given: Iterable[int], total: int
) -> Judged:
    """Put what a judge says of the answers that were given in the places of their questions.

    Args:
        judge: who judged.
        said: of each answer given.
        broken: whether that is broken text.
        given: the places of these answers among all.
        total: how many questions were put.
    """
    by_place = dict(zip(given, zip(said, broken, strict=True), strict=True))
    pairs = [by_place.get(i) for i in range(total)]
    return Judged(
        verdicts=tuple(pair and pair[0].verdict for pair in pairs),
        classes=tuple(
            pair and classify(pair[0].verdict, pair[1], reads_opening=judge.reads_opening) for pair in pairs
        ),
        scores=tuple(pair and pair[0].score for pair in pairs),
        scale=judge.scale,
    )
