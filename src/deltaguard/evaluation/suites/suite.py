"""The schema of a suite, and reading one by name or from a file."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Decoding, Positive, Seed
from deltaguard.evaluation.judges.classifiers import ClassifierSpec
from deltaguard.evaluation.judges.guards import GuardSpec
from deltaguard.evaluation.judges.llm import LLMSpec
from deltaguard.evaluation.judges.rules import RuleSpec
from deltaguard.files import expanded, parse_yaml, read_yaml
from deltaguard.reports.records.evaluation import SectionKind

SUITES = ("quick", "safety", "utility", "full")
"""The suites that come with deltaguard."""

Builtin = Literal["attack", "harmless", "unseen-attack", "unseen-harmless", "translated", "general", "task"]
AnyJudge = Annotated[RuleSpec | ClassifierSpec | GuardSpec | LLMSpec, Field(discriminator="kind")]
_DescribedT = TypeVar("_DescribedT", bound=BaseModel)
# Names become names of files; a probe's name is joined with a slash.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SecondAttack(_Part):
    """Further fine-tuning of each model on harmful examples before the section's questions are put.

    Attributes:
        count: how many examples.
        epochs: passes over them.
        learning_rate: peak learning rate of AdamW.
        seed: which examples, and of the training.
    """

    count: Positive = 10
    epochs: float = Field(default=5, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    seed: Seed = 0


class Gcg(_Part):
    """A suffix found by GCG for each question, model by model.

    Attributes:
        count: questions attacked, the section's first ones.
        steps: of the search, per question.
        search_width: candidates tried in each step.
    """

    count: Positive = 10
    steps: Positive = 250
    search_width: Positive = 512


class Harness(_Part):
    """Tasks of the lm-eval harness.

    Attributes:
        tasks: names as lm-eval knows them.
        limit: examples of each task, all where absent.
        seed: of the examples shown before a question.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: Positive | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"a task stands twice among {', '.join(self.tasks)}")
        return self


class Section(_Part):
    """Prompts of one kind and origin, and what is measured on them.

    Exactly one of `builtin`, `dataset`, `file` and `harness` says where the prompts come from.

    Attributes:
        name: unique in the suite.
        kind: `attack` (refusing is right), `harmless` (refusing is wrong) or `utility`.
        title: for people; made from the name where absent.
        builtin: a set that comes with deltaguard.
        dataset: a known public data set, which comes from the Hub or from `path`.
        path: where that data set lies on disk.
        file: a file of the user's own: CSV, TSV, JSON, JSON lines or parquet with `prompt`, and optionally
            `system` and `expected`. Relative paths, also those of judges, are looked up from the suite's
            folder.
        harness: tasks of lm-eval.
        count: prompts taken at most, drawn by `seed`; all where absent.
        seed: of that draw.
        max_new_tokens: instead of the suite's.
        probes: ways of asking; each adds a section `name/probe` beside the plain one.
        scorers: of answers against the expected ones.
        likelihood: measure the negative log-likelihood of the expected answers.
        grade: have the language models among the judges grade how good the answers are, from 1 to 10.
        second_attack: adds a section `name/second-attack`.
        gcg: adds a section `name/gcg`.
        optional: where the prompts cannot be had, note that and go on.
    """

    name: Name
    kind: SectionKind
    title: str | None = None
    builtin: Builtin | None = None
    dataset: str | None = None
    path: Path | None = None
    file: Path | None = None
    harness: Harness | None = None
    count: Positive | None = None
    seed: Seed = 0
    max_new_tokens: Positive | None = None
    probes: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    likelihood: bool = False
    grade: bool = False
    second_attack: SecondAttack | None = None
    gcg: Gcg | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sources = ("builtin", "dataset", "file", "harness")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)}; given: {', '.join(given) or 'none'}")
        if self.path is not None and self.dataset is None:
            raise ValueError("path says where a dataset lies; for a file of your own use file")
        if self.kind == "utility" and not (self.scorers or self.likelihood or self.harness or self.grade):
            raise ValueError("a utility section needs scorers, likelihood: true, grade: true, or harness")
        if self.kind != "utility" and (self.scorers or self.harness or self.grade):
            raise ValueError(f"scorers, grade and harness are for utility sections; the kind is {self.kind}")
        own = ("count", "scorers", "likelihood", "grade", "probes")
        if self.harness and (ignored := [name for name in own if getattr(self, name)]):
            raise ValueError(
                f"{', '.join(ignored)}: a harness asks and scores its own prompts (its `limit` says how many)"
            )
        if len(set(self.probes)) < len(self.probes):
            raise ValueError(f"a probe stands twice among {', '.join(self.probes)}")
        if self.kind == "utility" and self.probes:
            raise ValueError("probes are for attack and harmless sections")
        if self.kind != "attack" and (self.second_attack or self.gcg):
            raise ValueError(f"second_attack and gcg are for attack sections, and the kind is {self.kind}")
        return self


class Suite(_Part):
    """What models are asked and who judges.

    Attributes:
        name: of the suite.
        description: one or two sentences for people.
        decoding: how answers are drawn.
        judges: of all attack and harmless sections; at least one where there are such. Guards and language
            models judge attacks only, since they tell harm and not refusals.
        max_perplexity: answers above it under the first model count as incoherent, beside those that are
            broken by their form; absent leaves perplexity out.
        sections: at least one, each name once.
    """

    name: Name
    description: str = ""
    decoding: Decoding = Decoding()
    judges: tuple[AnyJudge, ...] = ()
    max_perplexity: float | None = Field(default=None, gt=1)
    sections: tuple[Section, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [section.name for section in self.sections]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sections of the same name: {', '.join(twice)}")
        judged = [section.name for section in self.sections if section.kind != "utility"]
        if judged and not self.judges:
            raise ValueError(f"no judges, and {', '.join(judged)} need one, such as `- kind: opening`")
        return self


def read_suite(name_or_path: str | Path) -> Suite:
    """Read a suite that comes with deltaguard, or a user's own.

    Args:
        name_or_path: one of `SUITES`, else a YAML file.

    Raises:
        DeltaguardError: there is no such suite, or the file is not one; every problem is named.

    Example:
        >>> read_suite("quick").name
        'quick'
    """
    remedy = "The page on evaluating models, in the documentation, says what a suite may hold."
    if str(name_or_path) in SUITES:
        text = (files("deltaguard.evaluation.suites") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return parse_yaml(text, Suite, source=f"The suite {name_or_path}", remedy=remedy)
    path = expanded(name_or_path)
    if not path.exists():
        raise DeltaguardError(f"There is no suite {path}: give a YAML file or one of {', '.join(SUITES)}.")
    suite = read_yaml(path, Suite, remedy=remedy)
    return suite.model_copy(
        update={
            "sections": tuple(_from_folder(section, path.parent) for section in suite.sections),
            "judges": tuple(_from_folder(judge, path.parent) for judge in suite.judges),
        }
    )


def read_judge(path: Path) -> AnyJudge:
    """Read a judge from a YAML file that describes it as a suite does, such as `kind: keywords`.

    Args:
        path: of the file; relative paths of files in it are looked up from its folder.

    Raises:
        DeltaguardError: it cannot be read, or describes no judge.
    """
    example = "`kind: guard`, `template: llama-guard` and `model: FOLDER`"
    remedy = f"It must describe a judge as suites do, such as {example}."
    path = expanded(path)
    judge: AnyJudge = read_yaml(path, TypeAdapter(AnyJudge), remedy=remedy)
    return _from_folder(judge, path.parent)


def _from_folder(described: _DescribedT, folder: Path) -> _DescribedT:
    """Make paths in a suite relative to the suite."""
    found = {name: value for name, value in described if isinstance(value, Path)}
    return described.model_copy(update={name: folder / expanded(path) for name, path in found.items()})
