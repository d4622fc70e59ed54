"""What is asked, what is answered, and who answers and judges."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from deltaguard.chat.conversations import Turn
from deltaguard.chat.thinking import without_thinking
from deltaguard.errors import DeltaguardError
from deltaguard.reports.records.evaluation import Better, SectionKind

Positive = Annotated[int, Field(ge=1, le=1_000_000)]
# What every generator of random numbers takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Verdict = Literal["refused", "complied", "undecided"]

MAX_MISSING = 0.05
"""The share of missing answers above which a run ends, unless an option says otherwise."""


@dataclass(frozen=True)
class Missed:
    """What stands in the place of an answer that was never given.

    Attributes:
        reason: what came instead, in words for people, without secrets.
        is_away: whether the server gave no reply, or said that it cannot answer now.
    """

    reason: str
    is_away: bool = False


class ServerAwayError(DeltaguardError):
    """Too much is missing of what a server was asked, and not too much would be were it not away."""


def refuse_too_many(
    missed: Sequence[Missed], total: int, max_share: float, *, whose: str, option: str
) -> None:
    """End a run in which too much was never answered.

    Args:
        missed: what stands in the place of the answers.
        total: how many there should be.
        max_share: of them that may be missing.
        whose: what is missing and from where, as the beginning of the message.
        option: what raises the share.

    Raises:
        ServerAwayError: more are missing, and not of those alone for which the server was there.
        DeltaguardError: more are missing.

    Example:
        >>> refuse_too_many([Missed("status 500")], 10, 0.05, whose="Answers of m", option="--max-missing")
        Traceback (most recent call last):
        deltaguard.errors.DeltaguardError: Answers of m: 1 of 10 are missing, and 5 % may be. ...
    """
    if len(missed) / total > max_share:
        lasting = sum(not each.is_away for each in missed)
        kind = DeltaguardError if lasting / total > max_share else ServerAwayError
        raise kind(
            f"{whose}: {len(missed)} of {total} are missing, and {100 * max_share:.3g} % may be. The first "
            f"reason: {missed[0].reason}. What was answered is kept: run the same command again to ask for "
            f"the rest, or allow more ({option})."
        )


Answer = str | Missed
OnBatch = Callable[[Sequence[int], Sequence[Answer]], None]


@dataclass(frozen=True)
class FollowUp:
    """What the user asks next in the same conversation.

    Attributes:
        prompt: what the user says.
        expected: the right answer, where there is one.
    """

    prompt: str
    expected: str | None = None


@dataclass(frozen=True)
class Question:
    """One request to a model.

    Attributes:
        prompt: what the user says.
        system: the system message; `None` leaves the chat template's own default in place.
        prefill: the beginning of the answer, put into the model's mouth.
        expected: the right answer, where there is one.
        follow_up: what is asked next, once there is an answer (see `continued`).
        earlier: what was asked and answered before, in the same conversation.
    """

    prompt: str
    system: str | None = None
    prefill: str = ""
    expected: str | None = None
    follow_up: FollowUp | None = None
    earlier: Turn | None = None

    def answered(self, answer: str) -> Turn:
        """Write the question and an answer as a conversation goes on with them.

        Args:
            answer: what the model wrote behind the prefill. Thoughts at its beginning are left out: models
                that think are not shown what they thought of earlier questions.
        """
        beginning, said = self.prefill.rstrip(), without_thinking(answer)
        return Turn(self.prompt, f"{beginning} {said}" if beginning else said, self.expected)

    def continued(self, answer: str) -> "Question":
        """Make the question that follows an answer to this one.

        Args:
            answer: as in `answered`.

        Raises:
            ValueError: nothing follows this question.

        Example:
            >>> first = Question("6 * 7?", follow_up=FollowUp("And twice that?"))
            >>> first.continued("42.").earlier
            Turn(prompt='6 * 7?', answer='42.', expected=None)
        """
        if self.follow_up is None:
            raise ValueError(f"{self.prompt!r} is not followed by another question.")
        then = self.follow_up
        return Question(then.prompt, self.system, expected=then.expected, earlier=self.answered(answer))


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Decoding:
    """How answers are drawn; in a suite, unless a section says otherwise.

    Attributes:
        max_new_tokens: tokens generated at most.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws; without effect at temperature 0.
    """

    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: Seed = 0


@dataclass(frozen=True)
class Exchange:
    """A request and its answer, as a judge sees them.

    Attributes:
        prompt: the request in plain words, without any wrapper of an attack.
        answer: all of the answer, a prefilled beginning included.
        prefill: that beginning, which is not the model's own.
        earlier: what was asked and answered before, in the same conversation; not itself to be judged.
    """

    prompt: str
    answer: str
    prefill: str = ""
    earlier: Turn | None = None


@dataclass(frozen=True)
class Judgement:
    """What a judge says of an answer.

    Attributes:
        verdict: `undecided` where the judge gave no output, or none that could be read.
        score: a judge's number, such as harmfulness from 1 to 5; `Judge.scale` says what it means.
    """

    verdict: Verdict
    score: float | None = None


@dataclass(frozen=True)
class Scale:
    """What a judge's numbers mean.

    Attributes:
        name: of their mean, such as `harmfulness`.
        better: which way that mean is better, by kind of section: refusing is right in one and wrong in
            another. On a kind that is absent the numbers say nothing, and are left out.
    """

    name: str
    better: Mapping[SectionKind, Better]


class Judge(Protocol):
    """Whoever tells refusals from compliance.

    Attributes:
        scale: what the scores mean; `None` where there are none.
        reads_opening: whether `refused` is told from the first sentence of an answer, and stands however
            broken the text is that follows.
    """

    scale: ClassVar[Scale | None]
    reads_opening: ClassVar[bool]

    @property
    def name(self) -> str:
        """Short and unique; tables use it."""
        ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """Judge each exchange, in order."""
        ...


@runtime_checkable
class Grader(Protocol):
    """A judge that can also say how good an answer is.

    Attributes:
        quality: what its grades mean.
    """

    quality: ClassVar[Scale]

    @property
    def name(self) -> str:
        """Short and unique; tables use it."""
        ...

    def grade(self, exchanges: Sequence[Exchange], references: Sequence[str | None]) -> list[float | None]:
        """Grade each answer, in order; `None` where there is no grade that can be read.

        Args:
            exchanges: requests and answers; those with an earlier turn are graded as what follows it.
            references: a right answer to each, where there is one.
        """
        ...


class Engine(Protocol):
    """Whatever generates the answers of one model."""

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> Sequence[Answer]:
        """Answer each question, in order, without the prefill.

        Args:
            questions: what is asked, each alone or behind what was said before it (`earlier`).
            decoding: how answers are drawn.
            on_batch: called after each batch with the indices asked and what came of them. What it raises
                ends the asking.
        """
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...


@runtime_checkable
class LikelihoodEngine(Engine, Protocol):
    """An engine that also says how likely given answers are."""

    def likelihood(self, questions: Sequence[Question]) -> list[float]:
        """Measure the mean negative log-likelihood of each expected answer, nats a token."""
        ...
