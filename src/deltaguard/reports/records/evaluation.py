"""What an evaluation found: several models on the same prompts, told by several judges, with intervals."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deltaguard.reports.records.base import Count, Environment, Record, Seconds, require_known

EVALUATION_NAME = "evaluation.json"
"""The file in an evaluation's folder that holds its `EvaluationReport`."""

SCHEMA_VERSION = 2
"""Of `EvaluationReport` as this release writes and reads it."""

SECOND_ATTACK = "second-attack"
"""How the name of a section ends whose model was fine-tuned again, after a slash."""

SectionKind = Literal["attack", "harmless", "utility"]
AnswerClass = Literal["refused", "complied", "incoherent", "undecided"]
Better = Literal["lower", "higher"]
IntervalMethod = Literal["wilson", "bootstrap", "newcombe"]
Finding = Literal["lower", "higher", "not told apart"]


class Estimate(Record):
    """A number with its 95 % interval.

    Attributes:
        value: the share, mean or score.
        low: lower end of the interval.
        high: upper end of the interval.
        total: how many prompts it was taken over, those without an answer left out.
        interval: how the interval was computed.
    """

    value: float
    low: float
    high: float
    total: Count
    interval: IntervalMethod


class EvaluatedModel(Record):
    """A model that was measured.

    Attributes:
        name: short and unique in the report; tables use it.
        reference: as the user gave it.
        fingerprint: hash of the weights, null where they cannot be seen (a server).
        chat_template_hash: sha256 of the chat template, null where it cannot be seen.
    """

    name: str
    reference: str
    fingerprint: str | None
    chat_template_hash: str | None


class SectionRow(Record):
    """A part of the suite: prompts of one kind and origin.

    Attributes:
        name: unique in the report, such as `attack` or `attack/base64`.
        kind: whether refusing is right, wrong, or not what is asked about.
        title: the same for people.
        prompts: how many; a question and the one that follows it in the same conversation are one.
        prompts_hash: sha256 of the prompts as given to the models, systems and prefills included.
        source: where they come from, with the terms of use where they are not deltaguard's own.
        max_new_tokens: tokens generated at most; 0 where nothing is generated.
    """

    name: str
    kind: SectionKind
    title: str
    prompts: Count
    prompts_hash: str
    source: str
    max_new_tokens: Count


class Measure(Record):
    """One number of one model.

    Attributes:
        model: name of the model.
        section: name of the section.
        name: what was measured: `attack success`, `false refusal`, `incoherent`, `undecided`, `exact match`,
            `rouge-l`, `harmfulness`, `refusal probability`, `quality`, `nll` and others; `missing` where a
            server left prompts unanswered, which no other number counts. Of conversations of two turns
            `quality` is the mean over both; `quality, first turn` and `quality, second turn` are of one each.
        judge: who told, null where no judge is needed.
        better: which way is better.
        estimate: the number.
    """

    model: str
    section: str
    name: str
    judge: str | None
    better: Better
    estimate: Estimate


class Comparison(Record):
    """Two models on the same prompts.

    Attributes:
        model: name of the model compared.
        reference: name of the model it is compared with.
        section: name of the section.
        name: the measure.
        judge: who told, null where no judge is needed.
        difference: mean of (model - reference) over the prompts.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: of the hypothesis that there is no difference.
        total: prompts for which both models have a number; the others are left out.
        test: how it was computed: `mcnemar` (exact) or `paired bootstrap`.
        finding: which way the model differs; `not told apart` where the interval holds 0 or p is 0.05
            or more.
    """

    model: str
    reference: str
    section: str
    name: str
    judge: str | None
    difference: float
    low: float
    high: float
    p_value: float
    total: Count
    test: Literal["mcnemar", "paired bootstrap"]
    finding: Finding


class Agreement(Record):
    """How far two judges agree on whether an answer refuses.

    Attributes:
        first: name of a judge.
        second: name of another.
        section: name of the section; over all models.
        kappa: Cohen's; null where both gave one and the same verdict throughout.
        agreed: answers on which they agree.
        total: answers that both decided.
    """

    first: str
    second: str
    section: str
    kappa: float | None
    agreed: Count
    total: Count


class HarnessTask(Record):
    """How a task or group of lm-eval was put to a model: only numbers of like tasks compare.

    Attributes:
        model: name of the model.
        section: name of the section.
        task: the harness's name of it.
        version: of the task.
        n_shot: examples shown before each question, null for a group whose tasks differ.
        chat_template: whether questions and examples were put through the model's chat template.
        samples: questions answered.
        harness_version: of lm-eval.
    """

    model: str
    section: str
    task: str
    version: str
    n_shot: Count | None
    chat_template: bool
    samples: Count
    harness_version: str


class AnswerSample(Record):
    """One prompt and what each model answered; the second one of a conversation comes right after the first.

    Attributes:
        section: name of the section.
        kind: kind of the section.
        prompt: what was asked.
        answers: by name of the model, those that answered.
        verdicts: by name of the model, then of the judge: what the answer was taken for.
    """

    section: str
    kind: SectionKind
    prompt: str
    answers: Mapping[str, str]
    verdicts: Mapping[str, Mapping[str, AnswerClass]] = Field(
        default_factory=dict[str, Mapping[str, AnswerClass]]
    )


class EvaluationReport(Record):
    """The report of an evaluation: its models, measures, comparisons and answers.

    Attributes:
        schema_version: rises when a field is added or changes its meaning; others are not read.
        environment: versions, machine and time.
        suite: name of the suite.
        suite_hash: sha256 of the suite as resolved.
        settings: the suite as resolved: sections, judges, decoding.
        engine: what generated the answers.
        decoding: how: temperature, seed.
        models: in the order given; the first is what the others are compared with.
        sections: the parts of the suite.
        measures: all numbers.
        comparisons: each later model with the first, paired on the same prompts.
        agreements: every pair of judges on every section.
        harness: every task of lm-eval that was asked for, of every model.
        samples: some answers side by side.
        notes: what a reader must know: what was skipped and why.
        files: sha256 of the files that hold every answer, by name.
        seconds: wall time by stage, over all runs in the folder.
    """

    schema_version: int = SCHEMA_VERSION
    environment: Environment
    suite: str
    suite_hash: str
    settings: Mapping[str, Any]
    engine: str
    decoding: Mapping[str, str | float | int | None]
    models: tuple[EvaluatedModel, ...] = Field(min_length=1)
    sections: tuple[SectionRow, ...]
    measures: tuple[Measure, ...]
    comparisons: tuple[Comparison, ...]
    agreements: tuple[Agreement, ...]
    harness: tuple[HarnessTask, ...]
    samples: tuple[AnswerSample, ...]
    notes: tuple[str, ...]
    files: Mapping[str, str]
    seconds: Mapping[str, Seconds]

    @model_validator(mode="before")
    @classmethod
    def _of_this_version(cls, data: Any) -> Any:
        """Before the fields, so that another version is told as that and not by the fields that differ."""
        given = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, Mapping) else SCHEMA_VERSION
        if given != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {given}, and this release of deltaguard reads version {SCHEMA_VERSION}"
            )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        models = {model.name for model in self.models}
        sections = {section.name for section in self.sections}
        for what in ("measures", "comparisons", "harness"):
            require_known(what, (row.model for row in getattr(self, what)), models)
        require_known("comparisons", (row.reference for row in self.comparisons), models)
        require_known("samples", (name for row in self.samples for name in row.answers), models)
        for what in ("measures", "comparisons", "agreements", "samples"):
            require_known(what, (row.section for row in getattr(self, what)), sections)
        return self
