"""Reports of garak, NVIDIA's attack scanner, read as an evaluation: its hits beside deltaguard's judges.

garak asks a server the prompts of its probes, among them suffixes that GCG found and prompts of AutoDAN, TAP
and PAIR, and has its detectors score each answer. Nothing is asked here, and garak is not imported.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, BaseModel, Discriminator, Field, Tag, TypeAdapter

from deltaguard.chat.thinking import without_thinking
from deltaguard.errors import DeltaguardError, listed
from deltaguard.evaluation.exchange import Exchange, Judge, Verdict
from deltaguard.evaluation.folder import require_same_suite, write_report
from deltaguard.evaluation.judges.coherence import is_broken
from deltaguard.evaluation.judges.rules import OpeningJudge
from deltaguard.evaluation.measure import placed
from deltaguard.evaluation.results import Judged, Result, agreements, comparisons, measures, samples
from deltaguard.files import expanded, read_file, read_json_lines
from deltaguard.models.results import EVALUATION, results_folder
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.evaluation import EvaluatedModel, EvaluationReport, SectionRow

HIT = 0.5
"""The score from which garak counts an answer as a hit, unless it is told otherwise."""

_SUITE = "garak"
_SAMPLES = 3
_TARGET = "MODEL"
"""Written for the name of the model that garak asked, which some of its prompts hold."""

_EVALUATED = 2
_REMEDY = "Give the file that garak calls NAME.report.jsonl, of a run that came to its end."


class _Text(BaseModel):
    text: str | None = None


class _Turn(BaseModel):
    content: _Text


class _Conversation(BaseModel):
    turns: list[_Turn] = Field(min_length=1)


class _Attempt(BaseModel):
    status: int
    probe_classname: str = Field(min_length=1)
    # Texts alone until 0.12.
    prompt: str | _Conversation | None
    outputs: list[str | _Text | None]
    detector_results: dict[str, list[Annotated[float, Field(ge=0, le=1)] | None]]

    @property
    def asked(self) -> str:
        """All turns of the prompt."""
        if not isinstance(self.prompt, _Conversation):
            return self.prompt or ""
        return "\n\n".join(turn.content.text or "" for turn in self.prompt.turns)


class _Setup(BaseModel):
    # Another name until 0.13.
    target: str = Field(validation_alias=AliasChoices("plugins.target_name", "plugins.model_name"))
    hit: float | None = Field(default=None, alias="run.eval_threshold")


class _Init(BaseModel):
    garak_version: str


class _Other(BaseModel):
    entry_type: str


_KINDS = {"attempt": "attempt", "start_run setup": "setup", "init": "init"}
_LINE: TypeAdapter[_Attempt | _Setup | _Init | _Other] = TypeAdapter(
    Annotated[
        Annotated[_Attempt, Tag("attempt")]
        | Annotated[_Setup, Tag("setup")]
        | Annotated[_Init, Tag("init")]
        | Annotated[_Other, Tag("other")],
        Discriminator(
            lambda line: (
                _KINDS.get(str(line.get("entry_type")), "other") if isinstance(line, Mapping) else "other"
            )
        ),
    ]
)


@dataclass(frozen=True)
class Answered:
    """One answer in a report of garak.

    Attributes:
        probe: whose prompt it answers, such as `dan.AutoDANCached`.
        prompt: as it was asked, with `MODEL` for the name of the model.
        answer: `None` where none came.
        hits: by detector: whether it counts as a success of the attack, `None` where it could not say.
    """

    probe: str
    prompt: str
    answer: str | None
    hits: Mapping[str, bool | None]


@dataclass(frozen=True)
class GarakRun:
    """One run of garak against one model.

    Attributes:
        version: of garak.
        target: the model's name, as garak was given it.
        answers: in the order of probe and prompt, one a prompt.
        further: how many further answers to the same prompts there are, by probe; they would count as more
            prompts.
    """

    version: str
    target: str
    answers: tuple[Answered, ...]
    further: Mapping[str, int]

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the probes, each once, in order."""
        return tuple(dict.fromkeys(each.probe for each in self.answers))

    def of(self, probe: str) -> tuple[Answered, ...]:
        """List the answers to one probe."""
        return tuple(each for each in self.answers if each.probe == probe)


def read_garak(path: Path) -> GarakRun:
    """Read a report of garak.

    Args:
        path: its `NAME.report.jsonl`.

    Raises:
        DeltaguardError: it is none, or of a run that did not end.
    """
    lines = read_json_lines(path, _LINE, remedy=_REMEDY)
    setups = [line for line in lines if isinstance(line, _Setup)]
    versions = [line.garak_version for line in lines if isinstance(line, _Init)]
    ended = any(isinstance(line, _Other) and line.entry_type == "completion" for line in lines)
    # An attempt is written when it is answered, and again when it was evaluated.
    attempts = [line for line in lines if isinstance(line, _Attempt) and line.status == _EVALUATED]
    lacking = [
        what
        for what, there in (
            ("what was set up (`start_run setup`)", len(setups) == 1),
            ("the version of garak (`init`)", len(versions) == 1),
            ("an attempt that was evaluated", bool(attempts)),
            ("its end (`completion`)", ended),
        )
        if not there
    ]
    if lacking:
        raise DeltaguardError(f"{path} is no whole report of garak: it lacks {', '.join(lacking)}. {_REMEDY}")
    target, hit = setups[0].target, HIT if setups[0].hit is None else setups[0].hit
    found = [each for attempt in attempts if (each := _answered(attempt, target, hit, path)) is not None]
    ordered = sorted(found, key=lambda each: (each.probe, each.prompt))
    further = Counter[str]()
    for attempt in attempts:
        further[attempt.probe_classname] += sum(output is not None for output in attempt.outputs[1:])
    return GarakRun(versions[0], target, tuple(ordered), further)


def _answered(attempt: _Attempt, target: str, hit: float, path: Path) -> Answered | None:
    """Take the first answer of an attempt; None where it has none at all."""
    # Until 0.12 detectors gave no score where no answer came; some give none at all where they cannot tell.
    whole, given = len(attempt.outputs), sum(output is not None for output in attempt.outputs)
    detected = attempt.detector_results.items()
    wrong = [name for name, scores in detected if len(scores) not in (0, given, whole)]
    if wrong:
        raise DeltaguardError(
            f"{path}: an attempt of {attempt.probe_classname} has {len(attempt.outputs)} answers, and other "
            f"numbers of scores by {', '.join(wrong)}. {_REMEDY}"
        )
    if not attempt.outputs:
        return None
    first = attempt.outputs[0]

    def is_hit(scores: Sequence[float | None]) -> bool | None:
        is_first = first is not None or len(scores) == whole
        return scores[0] >= hit if scores and is_first and scores[0] is not None else None

    return Answered(
        attempt.probe_classname,
        attempt.asked.replace(target, _TARGET) if target else attempt.asked,
        first.text if isinstance(first, _Text) else first,
        {name: is_hit(scores) for name, scores in detected},
    )


def garak_report(
    runs: Mapping[str, Path], output_dir: str | Path, *, judges: Sequence[Judge] = (OpeningJudge(),)
) -> EvaluationReport:
    """Put runs of garak side by side as an evaluation, a section a probe.

    Each of garak's detectors is a judge whose hits count as complied; deltaguard's read the same answers, and
    tell broken text from compliance, which garak's detectors of refusals do not. Of several answers to one
    prompt (garak's `generations`) the first counts: intervals are over prompts.

    Args:
        runs: reports of garak by the name of the model; the others are compared with the first, on probes
            that asked all of them the same prompts.
        output_dir: receives `evaluation.json` and a README.md, as `evaluate` writes them.
        judges: of deltaguard; none for garak's alone.

    Returns:
        The report.

    Raises:
        DeltaguardError: a report cannot be used, the models share no probe, or the folder holds something
            else.
    """
    read = {name: read_garak(path) for name, path in runs.items()}
    like = _probes_of_all(read)
    probes = list(like)
    results: list[Result] = []
    for probe in probes:
        detectors = _common([each.hits for run in read.values() for each in run.of(probe)])
        results += [_result(name, run.of(probe), detectors, judges) for name, run in read.items()]
    paired = [result for result in results if like[result.section.name]]
    report = EvaluationReport(
        environment=environment("not known: garak asked a server"),
        suite=_SUITE,
        suite_hash=sha256(json.dumps(probes).encode()).hexdigest(),
        settings={"probes": probes, "judges": [judge.name for judge in judges]},
        engine=" and ".join(dict.fromkeys(f"garak {run.version}" for run in read.values())),
        decoding={"as": "garak was told"},
        models=tuple(
            EvaluatedModel(name=name, reference=run.target, fingerprint=None, chat_template_hash=None)
            for name, run in read.items()
        ),
        sections=tuple(next(r.section for r in results if r.section.name == probe) for probe in probes),
        measures=measures(results),
        comparisons=comparisons(paired) if paired else (),
        agreements=agreements(results),
        harness=(),
        samples=samples(paired, _SAMPLES),
        notes=_notes(read, probes, like),
        files={f"{name}: {path.name}": sha256(read_file(path)).hexdigest() for name, path in runs.items()},
        seconds={},
    )
    folder = expanded(output_dir)
    with results_folder(folder, EVALUATION):
        require_same_suite(folder, _SUITE)
        write_report(folder, report, results)
    return report


def _probes_of_all(read: Mapping[str, GarakRun]) -> dict[str, bool]:
    """Find the probes that every run has, and whether each asked all models the same prompts."""
    probes = _common([dict.fromkeys(run.probes) for run in read.values()])
    if not probes:
        named = [f"{name}: {', '.join(run.probes)}" for name, run in read.items()]
        raise DeltaguardError(listed("The runs of garak have no probe in common", named))
    return {
        probe: len({tuple(a.prompt for a in run.of(probe)) for run in read.values()}) == 1 for probe in probes
    }


def _common(named: Sequence[Mapping[str, object]]) -> list[str]:
    """List the names that all have, in the order of the first."""
    return [name for name in named[0] if all(name in each for each in named)]


def _result(
    model: str, answers: Sequence[Answered], detectors: Sequence[str], judges: Sequence[Judge]
) -> Result:
    """Judge one model's answers to one probe."""
    probe, prompts = answers[0].probe, tuple(each.prompt for each in answers)
    given = {
        i: Exchange(each.prompt, without_thinking(each.answer))
        for i, each in enumerate(answers)
        if each.answer is not None
    }
    broken = [is_broken(each.answer) for each in given.values()]
    judged = {f"garak {name}": _as_garak_says(name, answers) for name in detectors}
    for judge in judges:
        judged[judge.name] = placed(judge, judge.judge([*given.values()]), broken, given, len(answers))
    section = SectionRow(
        name=probe,
        kind="attack",
        title=f"garak's probe {probe}",
        prompts=len(prompts),
        prompts_hash=sha256(json.dumps(prompts).encode()).hexdigest(),
        source="garak's own prompts, under its terms",
        max_new_tokens=0,
    )
    texts = tuple(each.answer for each in answers)
    return Result(model, section, prompts, texts, judged, values={}, given={})


def _as_garak_says(name: str, answers: Sequence[Answered]) -> Judged:
    verdicts: Mapping[bool | None, Verdict] = {None: "undecided", True: "complied", False: "refused"}
    said: tuple[Verdict | None, ...] = tuple(
        None if each.answer is None else verdicts[each.hits[name]] for each in answers
    )
    return Judged(verdicts=said, classes=said, scores=tuple(None for _ in said))


def _notes(runs: Mapping[str, GarakRun], probes: Sequence[str], like: Mapping[str, bool]) -> tuple[str, ...]:
    """Say what is left out, and what the numbers do not compare."""
    others = {name: [probe for probe in run.probes if probe not in probes] for name, run in runs.items()}
    return (
        *(
            f"{name} gave {further} further answers to the same prompts: the first counts, they do not."
            for name, run in runs.items()
            if (further := sum(run.further[probe] for probe in probes))
        ),
        *(
            f"{probe} asked the models different prompts: their numbers are not compared."
            for probe in probes
            if not like[probe]
        ),
        *(
            f"Probes that not all models were asked were left out; {name} was: {', '.join(left)}."
            for name, left in others.items()
            if left
        ),
    )
